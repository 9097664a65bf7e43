"""What a step leaves to be counted."""

import os
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from orthorank_vllm.engine.step_stats import Seconds, StepCounter
from orthorank_vllm.flops import Shapes, flops_saved
from orthorank_vllm.metrics import collector
from orthorank_vllm.metrics.recorder import WorkerMetrics
from orthorank_vllm.model.forward import Outcome
from orthorank_vllm.selection.plan import Batch, Plan, make_plan
from orthorank_vllm.selection.quotas import Quota

LABELS = {"model_name": "m", "engine": "0"}
SHAPES = Shapes(5, 64, 4, 2, 24, 176, vocabulary=300)
SECONDS = Seconds(plan=1e-4, forward=0.2)
KEEPS = {1: 1 / 3, 3: 0.0}


def batch(num_computed: list[int], query_len: list[int], prompt_len: list[int]) -> Batch:
    first = np.arange(len(query_len))
    return Batch(np.array(num_computed), np.array(query_len), np.array(prompt_len), first)


PROMPT = batch([0], [256], [256])


def plan_of(batch: Batch) -> Plan:
    plan = make_plan(batch, KEEPS.values(), 128, 64)
    assert plan is not None
    return plan


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    monkeypatch.setenv(collector.FOLDER_VARIABLE, os.fspath(tmp_path))
    registry = CollectorRegistry()
    registry.register(collector.FolderCollector(os.fspath(tmp_path)))
    return registry


def counter(is_first_stage: bool = True) -> StepCounter:
    return StepCounter(WorkerMetrics(LABELS, range(5)), SHAPES, is_first_stage, last_layer=4)


def outcome(plan: Plan, hits: int = 0, misses: int = 0) -> Outcome:
    return Outcome(quotas_of(plan), hits, misses)


def quotas_of(plan: Plan) -> dict[int, Quota]:
    return {
        layer: quota for layer, quota in zip(KEEPS, plan.quotas, strict=True) if quota is not None
    }


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"orthorank_{name}", {**LABELS, **labels})


def test_a_sparse_step_is_counted_layer_by_layer(registry: CollectorRegistry) -> None:
    """Position 0 and 64 of the tail in both layers; of 127 and 64 a third in one of them."""
    plan = plan_of(PROMPT)
    counter().count(PROMPT, plan, outcome(plan), SECONDS)
    skipped = [value(registry, "layer_token_updates_skipped_total", layer=str(i)) for i in range(5)]
    assert skipped == [0, 256 - 65 - 43 - 22, 0, 256 - 65, 0]
    updates = [value(registry, "layer_token_updates_total", layer=str(i)) for i in range(5)]
    assert updates == [256, 130, 256, 65, 256]
    assert value(registry, "token_updates_total") == sum(filter(None, updates))
    assert value(registry, "token_updates_skipped_total") == sum(filter(None, skipped))
    assert value(registry, "step_prefill_tokens_total", path="sparse") == 256
    assert value(registry, "step_prefill_seconds_total", path="sparse") == SECONDS.forward
    assert value(registry, "plan_duration_seconds_count") == 1
    assert value(registry, "flops_saved_total") == flops_saved(plan, SHAPES, quotas_of(plan), 4)


def test_a_later_stage_counts_its_layers_alone(registry: CollectorRegistry) -> None:
    """Guards against: a step and its sinks once for each stage."""
    plan = plan_of(PROMPT)
    for is_first in (True, False):
        counter(is_first).count(PROMPT, plan, outcome(plan, hits=2, misses=1), SECONDS)
    names = ("prefill_tokens_total", "sink_hits_total", "sink_misses_total")
    assert [value(registry, name) for name in names] == [256, 2, 1]
    assert value(registry, "step_duration_seconds_count", path="sparse") == 1
    assert value(registry, "layer_token_updates_skipped_total", layer="3") == 2 * (256 - 65)


def test_a_decode_step_is_a_stock_step_without_prefill(registry: CollectorRegistry) -> None:
    counter().count(None, None, None, SECONDS)
    assert value(registry, "step_duration_seconds_count", path="stock") == 1
    assert value(registry, "step_prefill_seconds_total", path="stock") == 0
    assert value(registry, "plan_duration_seconds_count") == 0


def test_a_prompt_in_which_nothing_competes_is_prefill_by_the_stock_path(
    registry: CollectorRegistry,
) -> None:
    counter().count(batch([0], [65], [65]), None, None, SECONDS)
    assert value(registry, "step_prefill_tokens_total", path="stock") == 65
    assert value(registry, "token_updates_total") == 65 * 5
    assert value(registry, "token_updates_skipped_total") == 0
