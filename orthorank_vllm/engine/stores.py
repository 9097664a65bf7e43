"""What keeps one configuration's K and V from another's, where KV connectors hand them on.

Stores find blocks by vLLM's hashes. Those of a request are made anew: of what others share, by who
made it; of its tail and answer, so that nobody finds them.
"""

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.engine.connectors import SEVERAL, STORES, asked_for
from orthorank_vllm.engine.prefix_cache import borders_for_others
from orthorank_vllm.selection.borders import Borders

# To be raised when the same configuration makes other K and V than before.
RULE = 1


def with_maker(config: OrthoRankConfig, transfer: Any) -> OrthoRankConfig:
    """A final configuration that says whose K and V its own are, where others may load them.

    Args:
        transfer: vLLM's `KVTransferConfig`, or None.
    """
    return replace(config, maker=_maker(config)) if asked_for(transfer) else config


def _maker(config: OrthoRankConfig) -> str:
    """A fingerprint of all that K and V depend on, beside tokens and what stock vLLM knows of.

    Of stand-ins that no file holds it is one of this start alone.
    """
    stand_in = ""
    if config.stand_in:
        try:
            stand_in = hashlib.sha256(Path(config.stand_in).read_bytes()).hexdigest()
        except OSError:
            stand_in = uuid.uuid4().hex
    decisive = {
        "rule": RULE,
        "layers": sorted(config.layers),
        "default": config.num_default,
        "window": config.window,
        "tail": config.tail,
        "aligned": config.aligned,
        "stand_in": stand_in,
        "measured_on": config.measured_on,
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def keep_apart(scheduler: Any, config: OrthoRankConfig) -> None:
    """Let stores find what this configuration made, and of a prompt only what others share.

    Args:
        scheduler: vLLM's, with its connector; changed in place.

    Raises:
        RuntimeError: this vLLM's requests are hashed otherwise.
    """
    if scheduler.connector is None or not config.maker:
        return
    from vllm.v1.request import Request

    if "_block_hasher" not in Request.__init__.__code__.co_names:
        raise RuntimeError("OrthoRank's K and V could be taken for stock vLLM's by a KV connector")
    maker = bytes.fromhex(config.maker)
    borders = borders_for_others(config, scheduler.block_size)
    add_request = scheduler.add_request

    def with_own_hashes(request: Any) -> None:
        shared = borders.shared(request.num_prompt_tokens) // scheduler.hash_block_size
        _hash_for_stores(request, maker, shared)
        add_request(request)

    scheduler.add_request = with_own_hashes
    for connector in _connectors_in(scheduler.connector):
        if type(connector).__name__ in STORES:
            found = connector.get_num_new_matched_tokens
            connector.get_num_new_matched_tokens = _up_to_shared(found, borders)


def _connectors_in(connector: Any) -> Iterator[Any]:
    if type(connector).__name__ == SEVERAL:
        yield from connector.sub_connectors
    else:
        yield connector


def _hash_for_stores(request: Any, maker: bytes, shared: int) -> None:
    """Hash a request's blocks anew: the first `shared` by who makes them, all others by chance."""
    alone = uuid.uuid4().bytes
    request.block_hashes[:] = [
        _salted(maker if block < shared else alone, block_hash)
        for block, block_hash in enumerate(request.block_hashes)
    ]
    hasher = request._block_hasher
    if hasher is not None:
        # Of what is generated: no block of it is a whole one of the prompt.
        request._block_hasher = lambda of: [_salted(alone, block_hash) for block_hash in hasher(of)]


def _salted(salt: bytes, block_hash: bytes) -> bytes:
    # As long as vLLM's: some stores take all hashes to be of one length.
    return hashlib.sha256(salt + block_hash).digest()[: len(block_hash)]


def _up_to_shared(
    found: Callable[[Any, int], tuple[int | None, bool]], borders: Borders
) -> Callable[[Any, int], tuple[int | None, bool]]:
    """A store's answer, cut to whole windows: of a window it may have lost some blocks."""

    def get_num_new_matched_tokens(
        request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        more, is_async = found(request, num_computed_tokens)
        if not more:
            return more, is_async
        end = min(num_computed_tokens + more, borders.shared(request.num_prompt_tokens))
        more = max(end - end % borders.window - num_computed_tokens, 0)
        return more, is_async and more > 0

    return get_num_new_matched_tokens
