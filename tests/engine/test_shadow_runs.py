"""vLLM's own schedulers with dense re-runs; only the model is left out."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.v1.request import RequestStatus

from orthorank_vllm.engine import shadow_runs
from orthorank_vllm.engine.scheduler import AlignedAsyncScheduler
from orthorank_vllm.engine.shadow_runs import MOST_PROMPTS, STEP_TOKENS, STEP_TOKENS_BESIDE
from orthorank_vllm.metrics.collector import orthorank_metrics
from tests.support.scheduling import FULL, Server

pytestmark = pytest.mark.model

RULE = {"layers": "29:0,12:1/3", "tail": 40, "window": 64, "shadow": 1.0}
LONG = list(range(500, 1500))
SCHEDULERS = [None, AlignedAsyncScheduler]


def started(model_path: str, scheduler: type | None = None, **options: Any) -> Server:
    chosen: dict[str, Any] = {"max_num_batched_tokens": 128, "max_num_seqs": 8, **options}
    server = Server(model_path, RULE, [FULL], scheduler_cls=scheduler, **chosen)
    # Of requests that it did not make itself, too.
    server.parts, server.reused = defaultdict(list), defaultdict(list)
    return server


def dropped(reason: str) -> float:
    return sum(
        sample.value
        for metric in orthorank_metrics()
        for sample in metric.samples
        if sample.name == "orthorank_shadow_dropped_total" and sample.labels["reason"] == reason
    )


def reruns(server: Server) -> dict[str, int]:
    """Tokens that were computed of each."""
    return {
        name: sum(part.end - part.start for part in parts)
        for name, parts in server.parts.items()
        if "shadow" in name
    }


def drain(server: Server) -> None:
    steps = 0
    while server.scheduler.has_requests():
        server.step()
        steps += 1
        assert steps < 200
    assert server.scheduler.requests == {}
    assert server.scheduler.kv_cache_manager.usage == 0


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_each_prompt_is_run_once_more_from_its_first_token(
    model_path: str, scheduler: type | None
) -> None:
    server = started(model_path, scheduler)
    for length in (300, 200, 41):
        server.add(LONG[:length], max_tokens=3)
    server.run()
    drain(server)
    # The last is not longer than its tail and position 0.
    assert sorted(reruns(server).values()) == [200, 300]
    assert server.serve(LONG[:300]) == 256


def test_prompts_with_an_adapter_or_with_embeddings_are_left_out(model_path: str) -> None:
    """Break seen: a prompt run once more by ids that stand for embeddings."""
    server = started(model_path)
    server.add(LONG[:250], prompt_embeds=torch.zeros(250, 4))
    server.add(LONG[:200], lora_request=LoRARequest("one", 1, "/nowhere"))
    server.add(LONG[:300])
    server.run()
    drain(server)
    assert list(reruns(server).values()) == [300]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_rerun_leaves_others_all_that_was_in_the_prefix_cache_and_nothing_of_its_own(
    model_path: str, scheduler: type | None
) -> None:
    """Its blocks are free ones that nobody has found anything in for longest, or never."""
    server = started(model_path, scheduler, blocks=41)
    server.serve(LONG[:300])
    drain(server)
    for number in range(3):
        # Dense ones share with none but dense ones.
        assert server.serve(LONG[:300], extra_args={"orthorank_ratio": 0.0}) == 288 * (number > 0)
    assert server.serve(LONG[:300]) == 256


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_its_blocks_go_to_whoever_needs_them_in_the_same_step(
    model_path: str, scheduler: type | None, policy: str
) -> None:
    """Whatever priority they ask for. Break seen: a request preempted in its place."""
    server = started(model_path, scheduler, blocks=28, scheduling_policy=policy)
    answering = server.add(LONG[:200], max_tokens=60, priority=9)
    while sum(reruns(server).values()) < 128:
        server.step()
    before = dropped("no_room")
    next_one = server.add(LONG[300:400], max_tokens=60, priority=1 << 40)
    steps = len(server.parts[next_one.request_id])
    server.step()
    assert len(server.parts[next_one.request_id]) == steps + 1
    server.run()
    assert answering.num_preemptions == next_one.num_preemptions == 0
    assert dropped("no_room") - before == 1
    drain(server)


@pytest.mark.parametrize(("answer", "most"), [(1, STEP_TOKENS), (60, STEP_TOKENS_BESIDE)])
def test_a_step_has_so_many_tokens_of_a_rerun_at_most_and_fewer_beside_answers(
    model_path: str, answer: int, most: int
) -> None:
    server = started(model_path, max_num_batched_tokens=2048)
    server.add(LONG[:900], max_tokens=answer)
    server.run()
    drain(server)
    (tokens,) = reruns(server).values()
    (parts,) = [parts for name, parts in server.parts.items() if "shadow" in name]
    assert tokens == 900
    whole, rest = divmod(900, most)
    assert [part.end - part.start for part in parts] == [most] * whole + [rest]


def test_of_more_prompts_than_are_kept_the_oldest_are_dropped(model_path: str) -> None:
    server = started(model_path, max_num_seqs=MOST_PROMPTS + 4)
    before = dropped("busy")
    for number in range(MOST_PROMPTS + 4):
        server.add(LONG[number : number + 100], max_tokens=60)
    while server.scheduler.get_request_counts()[1] or any(
        not request.num_output_tokens for request in server.scheduler.running
    ):
        server.step()
    assert dropped("busy") - before == 4
    server.run()
    drain(server)
    assert len(reruns(server)) == MOST_PROMPTS


def test_a_prompt_that_finds_no_idle_moment_is_forgotten(
    model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow_runs, "MOST_SECONDS", 0.0)
    server = started(model_path)
    before = dropped("busy")
    server.add(LONG[:200])
    server.run()
    drain(server)
    assert reruns(server) == {}
    assert dropped("busy") - before == 1


def test_all_are_forgotten_when_all_requests_are_aborted(model_path: str) -> None:
    """As vLLM does before it sleeps and when it ends."""
    server = started(model_path)
    server.add(LONG[:100], max_tokens=60)
    server.add(LONG[:300], max_tokens=60)
    while not reruns(server):
        server.step()
    ended = server.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert "shadow" not in str([getattr(each, "request_id", each) for each in ended])
    # What a worker is to hear of it.
    server.step()
    assert not server.scheduler.has_requests()
    assert server.scheduler.kv_cache_manager.usage == 0


def test_an_engine_that_is_paused_ends_its_rerun_and_begins_none(model_path: str) -> None:
    """Break seen: left out of each step, and never at its end, so that the pause never came."""
    from vllm.v1.core.sched.interface import PauseState

    server = started(model_path)
    server.add(LONG[:300], max_tokens=2)
    server.add(LONG[:200], max_tokens=2)
    while not reruns(server):
        server.step()
    server.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    for _ in range(2):
        server.step()
    assert not server.scheduler.has_requests()
    assert server.scheduler.kv_cache_manager.usage == 0
    server.scheduler.set_pause_state(PauseState.UNPAUSED)
    drain(server)
    # The other prompt was still kept.
    assert len(reruns(server)) == 2
