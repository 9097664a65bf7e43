"""vLLM's own scheduler with chunks that end on windows' borders; only the model is left out."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.scheduler import Scheduler

from orthorank_vllm.engine.scheduler import AlignedAsyncScheduler, AlignedScheduler
from orthorank_vllm.selection.borders import Borders
from tests.support.drafts import write_eagle
from tests.support.scheduling import BLOCK, FULL, KINDS, Server

pytestmark = pytest.mark.model

WINDOW, TAIL = 64, 40
BORDERS = Borders(WINDOW, TAIL)
CHOOSES = {"layers": "29:0,12:1/3", "tail": TAIL, "window": WINDOW}
KEEPS_NONE = {**CHOOSES, "layers": "29:0,12:0"}
LONG = list(range(500, 1000))


def is_cut_well(server: Server) -> bool:
    """Whether all that was computed and reused began and ended on a border or in the tail."""
    return all(
        position % WINDOW == 0 or position >= server.prompt_len[name] - TAIL
        for name, parts in server.parts.items()
        for part in parts
        for position in (part.start, part.end)
    ) and all(
        reused % WINDOW == 0 and reused <= BORDERS.shared(server.prompt_len[name])
        for name, times in server.reused.items()
        for reused in times
    )


def with_little_room(
    model_path: str, options: dict[str, Any], scheduler: type | None = None
) -> Server:
    """Steps of 100 tokens, which end in no window."""
    return Server(
        *(model_path, options, [FULL]),
        max_num_batched_tokens=100,
        max_num_seqs=8,
        scheduler_cls=scheduler,
    )


@pytest.mark.parametrize("budget", [WINDOW, 100, 130, 200])
@pytest.mark.parametrize("scheduler", [None, AlignedAsyncScheduler])
def test_chunks_end_on_borders(model_path: str, budget: int, scheduler: type | None) -> None:
    """vLLM schedules ahead of the worker on GPUs alone."""
    server = Server(
        *(model_path, CHOOSES, [FULL]),
        max_num_batched_tokens=budget,
        max_num_seqs=8,
        scheduler_cls=scheduler,
    )
    assert type(server.scheduler) is (scheduler or AlignedScheduler)
    for n in range(1, 4):
        server.add([n, *LONG[: 150 * n]], max_tokens=3)
    server.run()
    assert is_cut_well(server)
    assert max(len(parts) for parts in server.parts.values()) > 4


def test_without_alignment_they_end_anywhere(model_path: str) -> None:
    server = with_little_room(model_path, {**CHOOSES, "aligned": "off"})
    server.serve(LONG)
    assert type(server.scheduler) is Scheduler
    assert not is_cut_well(server)


def test_a_prompt_waits_where_less_than_a_window_is_left_of_the_step(model_path: str) -> None:
    server = Server(model_path, CHOOSES, [FULL], max_num_batched_tokens=WINDOW, max_num_seqs=8)
    answers = server.add(LONG[:20], max_tokens=30)
    waits = server.add(LONG, max_tokens=1)
    server.run()
    assert server.parts[waits.request_id][0].step > server.parts[answers.request_id][-1].step
    assert is_cut_well(server)


@pytest.mark.parametrize("length", [100, 103, 104, 167, 168, 400])
def test_whole_windows_before_the_tail_are_reused(model_path: str, length: int) -> None:
    server = Server(model_path, CHOOSES, [FULL])
    server.serve(LONG)
    assert server.serve(LONG[:length]) == (length - TAIL) // WINDOW * WINDOW


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_for_an_eagle_draft_windows_are_reused_up_to_the_last_that_is_found(
    model_path: str, tmp_path: Path, kind: str
) -> None:
    """vLLM drops the last block, with the state that a head has of it; the rest of its window goes.

    Break seen: a hit that ends amid a window asked for again without the block that is dropped, so
    that one block after the other went, and nothing was reused.
    """
    head = write_eagle(model_path, tmp_path / "head")
    draft = {"method": "eagle", "model": head, "num_speculative_tokens": 2}
    server = Server(model_path, CHOOSES, KINDS[kind], speculative_config=draft)
    server.serve(LONG)
    assert server.serve(LONG[:400]) == (400 - TAIL) // WINDOW * WINDOW
    assert server.serve(LONG) == BORDERS.shared(len(LONG)) - WINDOW
    assert is_cut_well(server)


def test_of_a_shorter_prompt_and_an_earlier_turn_no_more_is_left(model_path: str) -> None:
    """Their tails and answers are computed otherwise than in the middle of a longer prompt.

    Break seen: all of a request's blocks left to others.
    """
    server = Server(model_path, CHOOSES, [FULL])
    turn = server.add(LONG[:200], max_tokens=100)
    server.run()
    assert server.serve([*turn.all_token_ids, *range(50)]) == 128
    server.serve(LONG[:300])
    assert server.serve(LONG) == 256


def test_a_window_of_which_a_block_is_lost_is_computed_as_a_whole(model_path: str) -> None:
    """Break seen: hits that end where blocks do."""
    server = Server(model_path, CHOOSES, [FULL], blocks=40)
    server.serve(LONG)
    # Takes the last blocks of what is there, one after the other, and keeps none.
    server.serve(list(range(2000, 2330)))
    reused = server.serve(LONG)
    assert 0 < reused < BORDERS.shared(len(LONG))
    assert reused % WINDOW == 0


def test_a_block_of_a_window_that_ends_otherwise_is_not_taken(model_path: str) -> None:
    """Its tokens competed with others.

    Break seen: vLLM's own hashes, by which a window is put together of two prompts' blocks.
    """
    server = Server(model_path, CHOOSES, [FULL])
    prompts = LONG[:200], [*LONG[:100], *range(100)]
    assert [server.serve(prompt) for prompt in prompts] == [0, WINDOW]
    again = [server.add(prompt, max_tokens=9) for prompt in prompts]
    server.step()
    manager = server.scheduler.kv_cache_manager
    one, other = (manager.get_block_ids(request.request_id)[0] for request in again)
    assert [server.reused[request.request_id] for request in again] == [[128], [128]]
    whole = WINDOW // BLOCK
    assert one[:whole] == other[:whole]
    assert not {*one[whole:]} & {*other[whole:]}


@pytest.mark.parametrize("window", [16, 40, 64, 100])
def test_windows_that_end_amid_blocks_are_reused_where_both_end(
    model_path: str, window: int
) -> None:
    server = Server(model_path, {**CHOOSES, "window": window}, [FULL])
    server.serve(LONG)
    unit = math.lcm(window, BLOCK)
    assert server.serve(LONG) == (len(LONG) - TAIL) // unit * unit > 0


def test_where_no_layer_chooses_chunks_end_anywhere_and_only_tails_are_kept_apart(
    model_path: str,
) -> None:
    """There are no windows then: of a prompt all that differs from its like is its tail."""
    server = with_little_room(model_path, KEEPS_NONE)
    assert type(server.scheduler) is Scheduler
    server.serve(LONG[:201])
    assert server.parts["request 0"][0].end == 100
    assert server.serve(LONG) == (201 - TAIL) // BLOCK * BLOCK
    assert server.serve(LONG[:300]) == (300 - TAIL) // BLOCK * BLOCK


class Derived(AlignedScheduler):
    """A user's own, which differs in something else."""


def test_a_users_scheduler_that_derives_from_ours_is_aligned(model_path: str) -> None:
    server = with_little_room(model_path, CHOOSES, Derived)
    server.serve(LONG)
    assert type(server.scheduler) is Derived
    assert is_cut_well(server)


def test_ours_without_orthorank_is_vllms(model_path: str) -> None:
    """As with `--scheduler-cls` by hand and a ratio of 0."""
    server = with_little_room(model_path, {"ratio": 0}, AlignedScheduler)
    server.serve(LONG)
    assert server.parts["request 0"][0].end == 100


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_comes_together_chunks_end_on_borders_and_nobody_waits_for_ever(
    model_path: str, data: st.DataObject
) -> None:
    """Prompts that begin alike, priorities, little room in a step and in the cache: preemption."""
    options: dict[str, Any] = {
        "max_num_batched_tokens": data.draw(st.sampled_from([WINDOW, WINDOW + 1, 100, 300])),
        "max_num_seqs": data.draw(st.sampled_from([2, 8])),
        "scheduler_cls": data.draw(st.sampled_from([None, AlignedAsyncScheduler])),
        "scheduling_policy": data.draw(st.sampled_from(["fcfs", "priority"])),
        "long_prefill_token_threshold": data.draw(st.sampled_from([0, WINDOW, 90])),
    }
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    server = Server(model_path, CHOOSES, KINDS[kind], blocks=60, **options)
    for _ in range(data.draw(st.integers(2, 10))):
        same, length = data.draw(st.integers(0, 300)), data.draw(st.integers(1, 300))
        prompt = LONG[: min(same, length)] + [7] * (length - same)
        priority = data.draw(st.integers(0, 2))
        server.add(prompt, data.draw(st.integers(1, 60)), priority=priority)
        for _ in range(data.draw(st.integers(0, 6))):
            server.step()
    server.run()
    assert is_cut_well(server)
