"""How far vLLM's own scheduler reuses a prompt, for real; only the model is left out."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheSpec

from orthorank_vllm.options import OptionError
from tests.support.scheduling import BLOCK, FULL, KINDS, Server

pytestmark = pytest.mark.model

TAIL = 40
# Where prompts end and begin anywhere; what is aligned is in `test_scheduler.py`.
ORTHORANK = {"layers": "29:0,12:1/3", "tail": TAIL, "aligned": "off"}


def down_to_block(tokens: int) -> int:
    return tokens // BLOCK * BLOCK


@pytest.fixture(params=KINDS)
def groups(request: pytest.FixtureRequest) -> list[KVCacheSpec]:
    return KINDS[request.param]


@pytest.fixture
def server(model_path: str, groups: list[KVCacheSpec]) -> Server:
    return Server(model_path, ORTHORANK, groups)


LONG = list(range(500, 1000))


@pytest.mark.parametrize("length", [TAIL, TAIL + 1, 100, 160, 161, 167, 168, 169, 400])
def test_of_a_prompt_that_a_longer_one_began_with_all_but_the_tail_is_reused(
    server: Server, length: int
) -> None:
    """A hit ends where a block does, and the tail begins anywhere.

    Breaks seen: no limit; the limit one token too far.
    """
    server.serve(LONG)
    assert server.serve(LONG[:length]) == down_to_block(length - TAIL)


@pytest.mark.parametrize("length", [1, 20, TAIL - 1, TAIL])
def test_a_prompt_no_longer_than_the_tail_reuses_nothing(server: Server, length: int) -> None:
    server.serve(LONG)
    assert server.serve(LONG[:length]) == 0


def test_a_shorter_prompts_tail_is_reused_where_it_is_in_the_middle(server: Server) -> None:
    server.serve(LONG[:160])
    assert server.serve(LONG) == 160


def test_a_conversation_is_reused_up_to_the_tail_of_its_last_turn(server: Server) -> None:
    """Break seen: no limit."""
    turn = server.add(LONG[:160], max_tokens=100)
    server.run()
    history = list(turn.all_token_ids)
    assert len(history) == 260
    # A short question: the tail begins within the answer. A long one: it begins later.
    assert server.serve([*history, *range(10)]) == down_to_block(270 - TAIL)
    # The last token of an answer is never computed.
    assert server.serve([*history, *range(2000, 2200)]) == down_to_block(259)


def test_a_prompt_whose_log_probabilities_are_read_reuses_nothing(server: Server) -> None:
    server.serve(LONG)
    assert server.serve(LONG, prompt_logprobs=1) == 0


def test_lookups_are_counted_as_by_stock_vllm(server: Server) -> None:
    """Break seen: no limit."""
    server.serve(LONG)
    server.serve(LONG[:300])
    counts = [(stats.queries, stats.hits) for stats in server.lookups]
    assert counts == [(len(LONG), 0), (300, down_to_block(300 - TAIL))]


def test_a_preempted_request_computes_its_tail_again(model_path: str) -> None:
    """It and what was generated: its blocks might be those of a longer prompt."""
    server = Server(model_path, ORTHORANK, [FULL], blocks=40)
    requests = [server.add(list(range(n * 1000, n * 1000 + 150)), 120) for n in (1, 2, 3)]
    server.run()
    resumed = [n for request in requests for n in server.reused[request.request_id][1:]]
    assert resumed, "there were blocks enough: nothing was preempted"
    assert max(resumed) <= down_to_block(150 - TAIL)
    assert max(resumed) > 0


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_was_served_before_a_tail_is_never_reused(
    model_path: str, data: st.DataObject
) -> None:
    """Prompts that begin alike in all sorts of ways, several at a time, in a cache that is full.

    Breaks seen: no limit; the limit one token too far.
    """
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    server = Server(model_path, ORTHORANK, KINDS[kind], blocks=60)
    requests = []
    for _ in range(data.draw(st.integers(2, 8))):
        same, length = data.draw(st.integers(0, 300)), data.draw(st.integers(1, 300))
        prompt = LONG[: min(same, length)] + [7] * (length - same)
        requests.append(server.add(prompt, data.draw(st.integers(1, 60))))
        if data.draw(st.booleans()):
            server.run()
    server.run()
    for request in requests:
        most = max(request.num_prompt_tokens - TAIL, 0)
        assert all(reused <= most for reused in server.reused[request.request_id])


@pytest.fixture
def stock(model_path: str, groups: list[KVCacheSpec]) -> Iterator[Server]:
    """An engine without OrthoRank in the process of one that has it."""
    with_orthorank = Server(model_path, ORTHORANK, groups)
    yield Server(model_path, {"ratio": 0}, groups)
    with_orthorank.serve(LONG)
    assert with_orthorank.serve(LONG) == down_to_block(len(LONG) - TAIL)


def test_an_engine_without_orthorank_reuses_all_but_the_last_token(stock: Server) -> None:
    stock.serve(LONG)
    for length in (16, 17, 160, 161, 400):
        assert stock.serve(LONG[:length]) == down_to_block(length - 1)
    manager = stock.scheduler.kv_cache_manager
    assert "get_computed_blocks" not in vars(manager)
    assert "find_longest_cache_hit" not in vars(manager.coordinator)


class OtherScheduler:
    """Looks its requests up in ways of its own."""


class DerivedScheduler(Scheduler):
    """Differs in something else."""


@pytest.mark.parametrize("given", [OtherScheduler, f"{__name__}.OtherScheduler"])
def test_a_scheduler_that_does_not_derive_from_vllms_is_refused(
    model_path: str, given: Any
) -> None:
    with pytest.raises(OptionError, match=r"--scheduler-cls .*OtherScheduler: not possible with"):
        EngineArgs(
            model=model_path, scheduler_cls=given, additional_config={"orthorank": ORTHORANK}
        ).create_engine_config()


def test_a_scheduler_that_derives_from_vllms_keeps_tails_out_too(model_path: str) -> None:
    server = Server(model_path, ORTHORANK, [FULL], scheduler_cls=DerivedScheduler)
    assert type(server.scheduler) is DerivedScheduler
    server.serve(LONG)
    assert server.serve(LONG[:161]) == down_to_block(161 - TAIL)
