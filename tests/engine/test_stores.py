"""Whose K and V a KV connector may load: by vLLM's hashes of blocks, with its own scheduler."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import KVTransferConfig
from vllm.v1.request import Request

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.engine import nixl_connectors
from orthorank_vllm.engine.stores import _up_to_shared, with_maker
from orthorank_vllm.options import LayerKeep
from orthorank_vllm.selection.borders import Borders
from tests.support.scheduling import BLOCK, FULL, Server

# No whole block of the prompt is in its tail.
WINDOW, TAIL, PROMPT = 64, 10, 270
SHARED = (PROMPT - TAIL) // WINDOW * WINDOW // BLOCK
RULE = {"layers": "29:0,12:1/3", "tail": TAIL, "window": WINDOW}
TEXT = list(range(500, 900))
STORE = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
CONFIG = OrthoRankConfig(
    *(0.3, WINDOW, TAIL, 30),
    layers=(LayerKeep(29, 0.0), LayerKeep(12, 1 / 3)),
    measured_on="these weights",
)


def maker(config: OrthoRankConfig) -> str:
    return with_maker(config, STORE).maker


def in_folder(folder: Path) -> KVTransferConfig:
    return KVTransferConfig(
        kv_connector="ExampleConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"shared_storage_path": str(folder)},
    )


def served(model_path: str, rule: dict[str, Any] | None, **options: Any) -> Request:
    """A request of the same prompt, with 40 tokens of an answer."""
    server = Server(model_path, rule, [FULL], **options)
    request = server.add(TEXT[:PROMPT], max_tokens=40)
    server.run()
    assert len(request.block_hashes) == (PROMPT + 40) // BLOCK
    return request


@pytest.mark.parametrize(
    "other",
    [
        {"layers": (LayerKeep(29, 0.0),)},
        {"layers": (LayerKeep(29, 0.0), LayerKeep(12, 1 / 2))},
        {"layers": ()},
        {"window": 128},
        {"tail": 11},
        {"aligned": False},
        {"measured_on": "other weights"},
        {"stand_in": "a file that is not there"},
    ],
)
def test_whatever_changes_k_and_v_changes_their_maker(other: dict[str, Any]) -> None:
    assert maker(replace(CONFIG, **other)) != maker(CONFIG)


def test_what_does_not_change_them_does_not() -> None:
    """Or a store would be lost for nothing."""
    told = replace(CONFIG, ratio_asked=0.2, source="a profile", attention="gather", remedy="none")
    assert maker(told) == maker(CONFIG)
    assert maker(replace(CONFIG, layers=CONFIG.layers[::-1])) == maker(CONFIG)


def test_stand_ins_are_told_apart_by_what_is_in_their_file(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one", "the same", "another")]
    for file, content in zip(files, ("maps", "maps", "others"), strict=True):
        file.write_text(content)
    one, same, another = (maker(replace(CONFIG, stand_in=str(file))) for file in files)
    assert one == same != another


def test_without_a_connector_nothing_is_fingerprinted() -> None:
    assert with_maker(CONFIG, None) == CONFIG


@pytest.mark.model
def test_only_what_others_share_is_hashed_alike_and_by_one_configuration_alone(
    model_path: str, tmp_path: Path
) -> None:
    """Neither the tail nor the answer, whose K and V are another prompt's in no case.

    Breaks seen: the answer's hashes left as they were; no configuration in the hashes.
    """
    given = {"kv_transfer_config": in_folder(tmp_path)}
    first, again = (served(model_path, RULE, **given).block_hashes for _ in range(2))
    assert first[:SHARED] == again[:SHARED]
    assert len({*first, *again}) == 2 * len(first) - SHARED
    other = served(model_path, {**RULE, "layers": "29:0,12:1/2"}, **given).block_hashes
    stock = served(model_path, None, **given).block_hashes
    assert len({*first, *other, *stock}) == 3 * len(first)
    assert {len(block_hash) for block_hash in first} == {len(stock[0])}
    assert stock == served(model_path, None).block_hashes


@pytest.mark.model
def test_a_prompt_is_cut_as_without_a_connector(model_path: str, tmp_path: Path) -> None:
    alone = served(model_path, RULE)
    stored = served(model_path, RULE, kv_transfer_config=in_folder(tmp_path))
    assert alone.num_computed_tokens == stored.num_computed_tokens


@pytest.mark.parametrize(
    ("cached", "found", "loaded"),
    [
        (0, 0, 0),
        (0, 48, 0),
        (0, 64, 64),
        (0, 112, 64),
        (64, 48, 0),
        (64, 64, 64),
        (0, 288, 256),
        (256, 32, 0),
    ],
)
def test_of_a_store_that_lost_blocks_whole_windows_before_the_tail_are_loaded(
    cached: int, found: int, loaded: int
) -> None:
    """Break seen: no limit."""
    limited = _up_to_shared(lambda *_: (found, bool(found)), Borders(WINDOW, TAIL))
    request = SimpleNamespace(num_prompt_tokens=PROMPT)
    assert limited(request, cached) == (loaded, loaded > 0)


def test_a_store_that_has_not_looked_yet_is_asked_again() -> None:
    limited = _up_to_shared(lambda *_: (None, False), Borders(WINDOW, TAIL))
    assert limited(SimpleNamespace(num_prompt_tokens=PROMPT), 0) == (None, False)


def test_nixls_two_sides_agree_on_their_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """NIXL itself is not installed here: what its worker has made by then is put in its place."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlHandshakePayload

    def hashed(config: OrthoRankConfig) -> str:
        connector = object.__new__(nixl_connectors.NixlConnector)
        told = with_maker(config, STORE).as_dict()
        connector._vllm_config = SimpleNamespace(additional_config={"orthorank": told})
        connector.connector_worker = SimpleNamespace(
            compat_hash="stock",
            xfer_handshake_metadata=NixlHandshakePayload("stock", b""),
            register_kv_caches=lambda caches: None,
        )
        connector.register_kv_caches({})
        worker = connector.connector_worker
        assert worker.xfer_handshake_metadata.compatibility_hash == worker.compat_hash
        return str(worker.compat_hash)

    assert hashed(CONFIG) == hashed(CONFIG)
    assert len({hashed(CONFIG), hashed(replace(CONFIG, tail=11)), "stock"}) == 3
