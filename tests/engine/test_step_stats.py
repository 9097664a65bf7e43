"""What a step leaves to be counted, and that counting never waits for the device."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from orthorank_vllm.engine import step_stats
from orthorank_vllm.engine.step_stats import OnItsWay, Seconds, StepCounter
from orthorank_vllm.flops import Shapes
from orthorank_vllm.metrics import collector
from orthorank_vllm.metrics.recorder import WorkerMetrics
from orthorank_vllm.model.forward import Outcome
from orthorank_vllm.selection.plan import Batch, Plan, make_plan

LABELS = {"model_name": "m", "engine": "0"}
SHAPES = Shapes(5, 64, 4, 2, 24, 176, vocabulary=300)
SECONDS = Seconds(plan=1e-4, forward=0.2)


def batch(num_computed: list[int], query_len: list[int], prompt_len: list[int]) -> Batch:
    first = np.arange(len(query_len))
    return Batch(np.array(num_computed), np.array(query_len), np.array(prompt_len), first)


PROMPT = batch([0], [256], [256])


def plan_of(batch: Batch) -> Plan:
    plan = make_plan(batch, 1 / 3, 128)
    assert plan is not None
    return plan


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    monkeypatch.setenv(collector.FOLDER_VARIABLE, os.fspath(tmp_path))
    registry = CollectorRegistry()
    registry.register(collector.FolderCollector(os.fspath(tmp_path)))
    return registry


def counter() -> StepCounter:
    return StepCounter(WorkerMetrics(LABELS, range(5)), SHAPES, is_first_stage=True, last_layer=4)


def outcome(*skipped: int) -> Outcome:
    return Outcome(torch.tensor(skipped), sink_hits=0, sink_misses=0)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"orthorank_{name}", {**LABELS, **labels})


def test_a_sparse_step_is_counted_layer_by_layer(registry: CollectorRegistry) -> None:
    counter().count(PROMPT, plan_of(PROMPT), outcome(170, 169), (1, 3), SECONDS)
    skipped = [value(registry, "layer_token_updates_skipped_total", layer=str(i)) for i in range(5)]
    assert skipped == [0, 170, 0, 169, 0]
    updates = [value(registry, "layer_token_updates_total", layer=str(i)) for i in range(5)]
    assert updates == [256, 86, 256, 87, 256]
    assert value(registry, "token_updates_total") == sum(filter(None, updates))
    assert value(registry, "step_prefill_tokens_total", path="sparse") == 256
    assert value(registry, "step_prefill_seconds_total", path="sparse") == SECONDS.forward
    assert value(registry, "plan_duration_seconds_count") == 1


def test_a_decode_step_is_a_stock_step_without_prefill(registry: CollectorRegistry) -> None:
    counter().count(None, None, None, (1, 3), SECONDS)
    assert value(registry, "step_duration_seconds_count", path="stock") == 1
    assert value(registry, "step_prefill_seconds_total", path="stock") == 0
    assert value(registry, "plan_duration_seconds_count") == 0


def test_a_prompt_in_which_nothing_competes_is_prefill_by_the_stock_path(
    registry: CollectorRegistry,
) -> None:
    counter().count(batch([0], [2], [2]), None, None, (1, 3), SECONDS)
    assert value(registry, "step_prefill_tokens_total", path="stock") == 2
    assert value(registry, "token_updates_total") == 10


def test_numbers_still_on_the_device_are_counted_with_a_later_step(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Break seen: read at once, which waits for the device."""
    arrived = False

    class Slow(OnItsWay):
        @property
        def has_come(self) -> bool:
            return arrived

        def read(self) -> list[int]:
            assert arrived, "waited for the device"
            return super().read()

    monkeypatch.setattr(step_stats, "OnItsWay", Slow)
    steps = counter()
    steps.count(PROMPT, plan_of(PROMPT), outcome(170, 170), (1, 3), SECONDS)
    steps.count(PROMPT, plan_of(PROMPT), outcome(169, 169), (1, 3), SECONDS)
    assert value(registry, "prefill_tokens_total") == 512
    assert value(registry, "token_updates_skipped_total") == 0
    arrived = True
    steps.count(None, None, None, (1, 3), SECONDS)
    assert value(registry, "token_updates_skipped_total") == 2 * (170 + 169)
