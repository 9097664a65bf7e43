"""Which scheduler an engine gets, and how much room in a step it must have."""

from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.scheduler import Scheduler

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.engine.alignment import ASYNC_SCHEDULER, SCHEDULER, align
from orthorank_vllm.engine.scheduler import AlignedAsyncScheduler, AlignedScheduler
from orthorank_vllm.options import OptionError

pytestmark = pytest.mark.model

CHOOSES = {"layers": "29:0,12:1/3"}


def configured(model_path: str, orthorank: dict[str, Any], **options: Any) -> VllmConfig:
    options |= {"max_num_seqs": 8, "additional_config": {"orthorank": orthorank}}
    return EngineArgs(model=model_path, dtype="float32", **options).create_engine_config()


def resolved(config: VllmConfig) -> OrthoRankConfig:
    found = OrthoRankConfig.of_engine(config.additional_config)
    assert found is not None
    return found


def test_layers_that_choose_get_a_scheduler_that_keeps_to_borders(model_path: str) -> None:
    config = configured(model_path, CHOOSES)
    assert config.scheduler_config.scheduler_cls == SCHEDULER
    assert config.scheduler_config.get_scheduler_cls() is AlignedScheduler
    assert resolved(config).is_aligned


def test_one_that_schedules_ahead_stays_so(model_path: str) -> None:
    """vLLM decides on that before, and on CPU against it."""
    config = configured(model_path, CHOOSES)
    scheduler = config.scheduler_config
    scheduler.scheduler_cls, scheduler.async_scheduling = None, True
    align(config, resolved(config))
    assert scheduler.scheduler_cls == ASYNC_SCHEDULER
    assert scheduler.get_scheduler_cls() is AlignedAsyncScheduler


@pytest.mark.parametrize(
    ("orthorank", "is_aligned"),
    [
        ({**CHOOSES, "aligned": "off"}, False),
        ({**CHOOSES, "aligned": False}, False),
        ({**CHOOSES, "window": 0}, False),
        ({"layers": "29:0,28:0"}, True),
        ({"layers": "29:0,28:0", "window": 0}, True),
        ({"layers": "29:0,28:0", "aligned": "off"}, False),
    ],
)
def test_where_there_is_nothing_to_keep_to_the_scheduler_is_vllms(
    model_path: str, orthorank: dict[str, Any], is_aligned: bool
) -> None:
    """However small its steps."""
    config = configured(model_path, orthorank, max_num_batched_tokens=32)
    assert config.scheduler_config.scheduler_cls is None
    assert resolved(config).is_aligned is is_aligned


def test_a_ratio_of_zero_leaves_the_scheduler_alone(model_path: str) -> None:
    config = configured(model_path, {"ratio": 0}, max_num_batched_tokens=32)
    assert config.scheduler_config.scheduler_cls is None


class UsersScheduler(Scheduler):
    """Differs in something else."""


@pytest.mark.parametrize("given", [UsersScheduler, f"{__name__}.UsersScheduler"])
def test_a_scheduler_given_by_hand_stays_and_one_line_says_what_that_means(
    model_path: str, log_lines: list[str], given: Any
) -> None:
    config = configured(model_path, CHOOSES, scheduler_cls=given, max_num_batched_tokens=32)
    assert config.scheduler_config.get_scheduler_cls().__name__ == "UsersScheduler"
    assert not resolved(config).is_aligned
    [line] = {line for line in log_lines if "aligned" in line}
    assert "UsersScheduler ends chunks of prompts anywhere" in line
    assert f"Derive it from {SCHEDULER}, or leave it out" in line


@pytest.mark.parametrize("given", [AlignedScheduler, SCHEDULER])
def test_ours_given_by_hand_is_aligned(model_path: str, given: Any) -> None:
    assert resolved(configured(model_path, CHOOSES, scheduler_cls=given)).is_aligned


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"max_num_batched_tokens": 127}, "--max-num-batched-tokens 127"),
        (
            {"max_num_batched_tokens": 512, "max_num_scheduled_tokens": 100},
            "--max-num-scheduled-tokens 100",
        ),
        ({"long_prefill_token_threshold": 64}, "--long-prefill-token-threshold 64"),
    ],
)
def test_chunks_too_small_for_a_window_are_refused_in_one_line(
    model_path: str, options: dict[str, int], line: str
) -> None:
    """Break seen: none of it refused, and prompts that never begin."""
    with pytest.raises(OptionError) as caught:
        configured(model_path, CHOOSES, **options)
    assert str(caught.value) == (
        f"{line}: not allowed, with --orthorank-window 128 give at least 128, so that a chunk of a "
        "prompt can end where a window does, or --orthorank-aligned off"
    )
    configured(model_path, {**CHOOSES, "window": 64}, **options)
    configured(model_path, {**CHOOSES, "aligned": "off"}, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 128, "long_prefill_token_threshold": 128},
        # The longest prompt is one chunk.
        {"max_num_batched_tokens": 100, "max_model_len": 100},
    ],
)
def test_room_for_a_window_or_for_the_longest_prompt_is_enough(
    model_path: str, options: dict[str, int]
) -> None:
    assert resolved(configured(model_path, CHOOSES, **options)).is_aligned


def test_layers_that_are_still_to_be_chosen_may_choose(
    model_path: str, small_model_path: str
) -> None:
    config = configured(small_model_path, {"ratio": 0.2})
    assert resolved(config).to_choose
    assert config.scheduler_config.scheduler_cls == SCHEDULER
