"""What requests of other ratios leave in the prefix cache, by vLLM's own scheduler."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.scheduler import Scheduler

from tests.support.scheduling import BLOCK, FULL, KINDS, Server

pytestmark = pytest.mark.model

WINDOW, TAIL = 64, 40
# Ratios 1/30, 1/30 + 2/90 and 2/30 + 2/90.
RULE = {"layers": "29:0,12:1/3,7:0", "ratio": 0.05, "max_ratio": 0.088, "tail": TAIL}
ALIGNED = {**RULE, "window": WINDOW}
UNALIGNED = {**RULE, "aligned": "off"}
DENSE_BY_DEFAULT = {**ALIGNED, "ratio": 0}
# As many layers as the first; those of the default; all.
RATIOS = [0.0, 0.01, 0.03, None, 0.05, 0.08]
COUNTS = {0.0: 0, 0.01: 1, 0.03: 1, None: 2, 0.05: 2, 0.08: 3}
LONG = list(range(500, 1000))


def asking(ratio: float | None) -> dict[str, Any]:
    return {} if ratio is None else {"extra_args": {"orthorank_ratio": ratio}}


@pytest.mark.parametrize("rule", [ALIGNED, UNALIGNED], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("salt", [None, "a client's"])
def test_blocks_are_found_by_requests_of_as_many_layers_alone(
    model_path: str, rule: dict[str, Any], salt: str | None
) -> None:
    """Break seen: no salt."""
    for filler in RATIOS:
        server = Server(model_path, rule, [FULL])
        server.serve(LONG, cache_salt=salt, **asking(filler))
        for ratio in RATIOS:
            reused = server.serve(LONG[:400], cache_salt=salt, **asking(ratio))
            assert (reused > 0) == (COUNTS[ratio] == COUNTS[filler]), (filler, ratio)
            # What it computed is there for the next one of its kind, which is none of the others.
            server.scheduler.reset_prefix_cache()
            server.serve(LONG, cache_salt=salt, **asking(filler))


@pytest.mark.parametrize("ratio", [0.0, 0.08])
def test_a_clients_salt_keeps_requests_of_one_ratio_apart(model_path: str, ratio: float) -> None:
    server = Server(model_path, ALIGNED, [FULL])
    server.serve(LONG, cache_salt="mine", **asking(ratio))
    assert server.serve(LONG, cache_salt="yours", **asking(ratio)) == 0
    assert server.serve(LONG, **asking(ratio)) == 0
    assert server.serve(LONG, cache_salt="mine", **asking(ratio)) > 0


def test_no_salt_of_a_clients_finds_another_ratios_blocks(model_path: str) -> None:
    """Guards against: a salt made of text, which a client could send."""
    server = Server(model_path, UNALIGNED, [FULL])
    request = server.add(LONG, **asking(0.08))
    server.run()
    assert not isinstance(request.cache_salt, str)
    for guess in (str(request.cache_salt), "3", "0.08"):
        assert server.serve(LONG, cache_salt=guess) == 0


def test_a_block_that_only_its_answer_fills_is_apart_too(model_path: str) -> None:
    """Guards against: the hashes that are there salted, and not one that comes later."""
    prompt = LONG[: BLOCK - 1]
    server = Server(model_path, UNALIGNED, [FULL])
    request = server.add(prompt, max_tokens=60, **asking(0.08))
    server.run()
    turn = list(request.all_token_ids)
    assert server.serve([*turn, *LONG]) == 0
    assert server.serve([*turn, *LONG], **asking(0.08)) > 0


@pytest.mark.parametrize(
    ("rule", "ratio"), [(ALIGNED, 0.0), (UNALIGNED, 0.0), (DENSE_BY_DEFAULT, None)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_prompt_is_cut_and_reused_as_by_stock_vllm(
    model_path: str, rule: dict[str, Any], ratio: float | None, kind: str
) -> None:
    """Its tail too."""
    little_room: dict[str, Any] = {"max_num_batched_tokens": 100, "max_num_seqs": 8}
    ours = Server(model_path, rule, KINDS[kind], **little_room)
    stock = Server(model_path, None, KINDS[kind], **little_room)
    assert type(stock.scheduler) is Scheduler
    for prompt in (LONG[:201], LONG, LONG[:300], LONG[:300]):
        assert ours.serve(prompt, **asking(ratio)) == stock.serve(prompt)
    assert ours.parts == stock.parts


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_comes_together_nobody_finds_another_ratios_blocks(
    model_path: str, data: st.DataObject
) -> None:
    """With preemption: every block that is held twice is held by requests of as many layers."""
    rule = data.draw(st.sampled_from([ALIGNED, UNALIGNED, DENSE_BY_DEFAULT]))
    room: dict[str, Any] = {"max_num_batched_tokens": 100, "max_num_seqs": 8}
    server = Server(model_path, rule, [FULL], blocks=60, **room)
    default = 0 if rule is DENSE_BY_DEFAULT else 2
    owner: dict[str, int] = {}

    def check() -> None:
        held: dict[int, int] = {}
        for request in server.scheduler.running:
            for block in server.scheduler.kv_cache_manager.get_block_ids(request.request_id)[0]:
                count = owner[request.request_id]
                assert held.setdefault(block, count) == count

    for _ in range(data.draw(st.integers(2, 10))):
        ratio = data.draw(st.sampled_from(RATIOS))
        salt = data.draw(st.sampled_from([None, "mine", "1", "(1, None)", "\0"]))
        prompt = LONG[: data.draw(st.integers(1, 300))]
        count = default if ratio is None else COUNTS[ratio]
        name = f"request {len(server.reused)}"
        owner[name] = count
        server.add(prompt, data.draw(st.integers(1, 60)), cache_salt=salt, **asking(ratio))
        for _ in range(data.draw(st.integers(0, 6))):
            server.step()
            check()
    server.run()
