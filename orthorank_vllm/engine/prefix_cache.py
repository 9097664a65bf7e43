"""How much of a prompt may come from the prefix cache, and be left there for others.

Nothing of its tail: rows of it may lie in blocks that a longer prompt filled, in whose middle they
were not computed. Where prompts are aligned, whole windows before the tail, and no prompt leaves
more: in what follows, its own tail among it, other tokens are computed than in a longer prompt.
And a block of a window is found by all of the window's tokens, those after the block too: they
competed with its own. What was computed at one ratio is never found at another; a prompt that skips
nothing reuses and leaves whatever stock vLLM would.

vllm/v1/core/kv_cache_manager.py: a lookup goes up to a length, and every kind of attention makes of
that what it can resume at; `cache_blocks` is told up to where a request's blocks may be found.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.engine.request_ratio import is_dense, num_selective
from orthorank_vllm.selection.borders import Borders


def shared_borders(borders: Borders, block_size: int) -> Borders:
    """The ends of windows that are ends of blocks as well."""
    return borders._replace(window=math.lcm(borders.window, block_size))


def borders_for_others(config: OrthoRankConfig, block_size: int) -> Borders:
    """Where what a prompt leaves to others ends: whole blocks, and windows where it is aligned."""
    return shared_borders(config.borders or Borders(1, config.tail), block_size)


def hashes_of_windows(block_hashes: Sequence[bytes], blocks_per_window: int) -> list[bytes]:
    """A prompt's hashes, those of each whole window's blocks made of its last one's.

    vLLM's hash of a block is one of all tokens up to the block's end.
    """
    hashes = list(block_hashes)
    for end in range(blocks_per_window, len(hashes) + 1, blocks_per_window):
        window = block_hashes[end - 1]
        for block in range(blocks_per_window):
            digest = hashlib.sha256(window + block.to_bytes(4, "big")).digest()
            hashes[end - blocks_per_window + block] = digest[: len(window)]
    return hashes


def keep_tails_out(manager: Any, config: OrthoRankConfig, block_size: int) -> None:
    """Let every request that `manager` serves compute the tail of its prompt by itself.

    A preempted request's tail, and what follows it, is computed again: its own blocks cannot be
    told from those of a longer prompt. Lookups are counted as ever, with fewer hits.

    Args:
        manager: vLLM's `KVCacheManager`; other engines' in this process stay as they are.
        block_size: the scheduler's.
    """
    if not (config.layers or config.to_choose):
        return
    coordinator = manager.coordinator
    get_computed_blocks = manager.get_computed_blocks
    find_longest_cache_hit = coordinator.find_longest_cache_hit
    cache_blocks = coordinator.cache_blocks
    borders = config.borders and shared_borders(config.borders, block_size)
    most, window = 0, 1

    # Since 0.33 the scheduler may give a limit of its own, which reaches `up_to_tail` from there.
    def without_tail(request: Any, *limit: Any, **named_limit: Any) -> Any:
        nonlocal most, window
        if is_dense(config, request.sampling_params, request.num_prompt_tokens):
            most, window = request.num_tokens, 1
        else:
            window, tail = borders or Borders(1, config.tail)
            most = max(request.num_prompt_tokens - tail, 0)
        found = get_computed_blocks(request, *limit, **named_limit)
        if found[1] > most or found[1] % window:
            raise RuntimeError(
                f"OrthoRank's tail or a part of a window would come from the prefix cache: vLLM "
                f"reuses {found[1]} of {request.num_prompt_tokens} prompt tokens, and at most "
                f"{most} were to be, in windows of {window}"
            )
        return found

    def up_to_tail(block_hashes: Sequence[Any], max_cache_hit_length: int) -> Any:
        found = find_longest_cache_hit(block_hashes, min(max_cache_hit_length, most))
        # Again and again: what a shorter hit can be is for each kind of attention to say. For an
        # EAGLE draft the last block of what is found is dropped: one more than wanted is asked for.
        while beyond := found[1] % window:
            border = found[1] - beyond
            found = find_longest_cache_hit(block_hashes, border + block_size)
            if found[1] > border:
                found = find_longest_cache_hit(block_hashes, border)
        return found

    manager.get_computed_blocks = without_tail
    coordinator.find_longest_cache_hit = up_to_tail
    if borders is not None:
        shared = borders.shared

        def of_whole_windows(request: Any, num_computed_tokens: int) -> None:
            if not is_dense(config, request.sampling_params, request.num_prompt_tokens):
                num_computed_tokens = min(num_computed_tokens, shared(request.num_prompt_tokens))
            cache_blocks(request, num_computed_tokens)

        coordinator.cache_blocks = of_whole_windows


def keep_ratios_apart(scheduler: Any, config: OrthoRankConfig) -> None:
    """Let requests share blocks only where tokens of both are skipped in as many layers.

    By vLLM's own salt, whatever a client gave: those are strings, and this is none.

    Args:
        scheduler: vLLM's `Scheduler`; other engines' in this process stay as they are.
    """
    add_request = scheduler.add_request

    def salted(request: Any) -> None:
        count = num_selective(config, request.sampling_params, request.num_prompt_tokens)
        if count != config.num_default:
            request.cache_salt = count, request.cache_salt
            request.block_hashes.clear()
            request.update_block_hashes()
        add_request(request)

    scheduler.add_request = salted
