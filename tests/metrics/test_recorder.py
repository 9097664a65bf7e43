"""What a worker tells of itself, and what its counts cost."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from orthorank_vllm import __version__
from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.metrics import collector, definitions
from orthorank_vllm.metrics.recorder import WorkerMetrics
from orthorank_vllm.metrics.shadow import DroppedCounter
from orthorank_vllm.metrics.status import as_json, engines_of
from orthorank_vllm.options import LayerKeep
from orthorank_vllm.profiles import Cost
from orthorank_vllm.start_lines import start_up_line

LABELS = {"model_name": "m", "engine": "0"}
CONFIG = OrthoRankConfig(
    ratio_asked=0.3,
    window=128,
    tail=64,
    num_layers=5,
    layers=(LayerKeep(3, 0.0), LayerKeep(1, 1 / 3)),
    source="profile p",
    expected=Cost({"prose": 0.004, "copy": 0.03}, found=0.98),
)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    monkeypatch.setenv(collector.FOLDER_VARIABLE, os.fspath(tmp_path))
    registry = CollectorRegistry()
    registry.register(collector.FolderCollector(os.fspath(tmp_path)))
    return registry


def test_counters_and_histograms_are_zero_before_the_first_prompt(
    registry: CollectorRegistry,
) -> None:
    """So that a rate over the first minutes is right, and an alert on it can fire."""
    WorkerMetrics(LABELS, range(2))
    value = registry.get_sample_value
    assert value("orthorank_prefill_tokens_total", LABELS) == 0
    assert value("orthorank_sink_misses_total", LABELS) == 0
    assert value("orthorank_layer_token_updates_skipped_total", {**LABELS, "layer": "1"}) == 0
    for path in ("sparse", "stock"):
        by_path = {**LABELS, "path": path}
        assert value("orthorank_step_duration_seconds_count", by_path) == 0
        assert value("orthorank_step_prefill_tokens_total", by_path) == 0
    assert value("orthorank_plan_duration_seconds_count", LABELS) == 0


def test_what_is_run_stands_in_labels(registry: CollectorRegistry) -> None:
    WorkerMetrics(LABELS, range(5)).tell(CONFIG)
    value = registry.get_sample_value
    told = {
        "window": "128",
        "tail": "64",
        "aligned": "true",
        "stand_in": "off",
        "layers": "3:0,1:0.3333",
        "chosen_by": "profile p",
        "measured": "true",
        "version": __version__,
    }
    assert value("orthorank_config_info", {**LABELS, **told}) == 1
    assert value("orthorank_ratio_asked", LABELS) == 0.3
    assert value("orthorank_ratio_configured", LABELS) == pytest.approx((1 + 2 / 3) / 5)


def test_what_answers_lose_is_told_by_the_kind_of_text(registry: CollectorRegistry) -> None:
    WorkerMetrics(LABELS, range(5)).tell(CONFIG)
    value = registry.get_sample_value
    assert value("orthorank_expected_loss_nats", {**LABELS, "kind": "prose"}) == 0.004
    assert value("orthorank_expected_loss_nats", {**LABELS, "kind": "copy"}) == 0.03
    assert value("orthorank_expected_lookups_found_ratio", LABELS) == 0.98


def test_what_nobody_measured_is_not_told(registry: CollectorRegistry) -> None:
    """Break seen: a loss of 0."""
    WorkerMetrics(LABELS, range(5)).tell(replace(CONFIG, expected=None))
    names = {sample.name for metric in registry.collect() for sample in metric.samples}
    assert not {"orthorank_expected_loss_nats", "orthorank_expected_lookups_found_ratio"} & names


def test_what_is_told_is_read_back(registry: CollectorRegistry) -> None:
    """As `GET /orthorank` and `orthorank doctor` show it."""
    WorkerMetrics(LABELS, range(5)).tell(CONFIG)
    [engine] = engines_of(registry.collect())
    told = as_json(engine)
    assert (told["active"], told["is_measured"], told["version"]) == (True, True, __version__)
    assert (told["window"], told["tail"], told["chosen_by"]) == (128, 64, "profile p")
    assert list(told["layers"].items()) == [(3, 0.0), (1, 0.3333)]
    assert told["is_aligned"] is True
    assert (told["ratio_asked"], told["ratio_configured"]) == (0.3, CONFIG.ratio)
    assert told["expected_loss"] == {"prose": 0.004, "copy": 0.03}
    assert told["expected_found"] == 0.98
    assert told["ratio_reached"] is None
    json.dumps(told)


def test_no_layers_are_read_back_as_none(registry: CollectorRegistry) -> None:
    """Break seen: an empty label, read as a layer without a number."""
    config = replace(CONFIG, ratio_asked=None).dense("no time", "more time")
    WorkerMetrics(LABELS, range(5)).tell(replace(config, expected=None))
    [engine] = engines_of(registry.collect())
    assert (engine.layers, engine.ratio_configured, engine.is_measured) == ({}, 0, False)
    assert (engine.expected_loss, engine.expected_found) == ({}, None)


@pytest.mark.parametrize("off", [{"aligned": False}, {"window": 0}])
def test_a_server_that_is_not_aligned_tells_so(
    registry: CollectorRegistry, off: dict[str, Any]
) -> None:
    config = replace(CONFIG, **off)
    WorkerMetrics(LABELS, range(5)).tell(config)
    [engine] = engines_of(registry.collect())
    assert engine.is_aligned is False
    assert "not aligned" in start_up_line(config)
    assert "aligned" not in start_up_line(CONFIG)


def test_guessed_layers_are_told_by_a_label(registry: CollectorRegistry) -> None:
    config = replace(CONFIG, num_layers=6, expected=None).unmeasured("no time", "more time")
    WorkerMetrics(LABELS, range(6)).tell(config)
    [told] = [
        sample.labels
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "orthorank_config_info"
    ]
    assert (told["measured"], told["chosen_by"]) == (
        "false",
        "the last layers, not measured: no time",
    )


def test_no_ratio_asked_is_told_where_none_was(registry: CollectorRegistry) -> None:
    WorkerMetrics(LABELS, range(5)).tell(replace(CONFIG, ratio_asked=None))
    assert registry.get_sample_value("orthorank_ratio_asked", LABELS) is None
    assert registry.get_sample_value("orthorank_active", LABELS) == 1


def test_an_engine_whose_layers_are_still_open_is_not_active(registry: CollectorRegistry) -> None:
    WorkerMetrics(LABELS, range(5))
    assert registry.get_sample_value("orthorank_active", LABELS) is None


def test_every_name_is_told(registry: CollectorRegistry) -> None:
    WorkerMetrics(LABELS, range(5)).tell(replace(CONFIG, shadow=0.01))
    assert {metric.name for metric in registry.collect()} == set(definitions.HELP)


def test_nothing_is_told_of_comparisons_where_there_are_none(registry: CollectorRegistry) -> None:
    WorkerMetrics(LABELS, range(5)).tell(CONFIG)
    assert not [metric.name for metric in registry.collect() if "shadow" in metric.name]


def test_a_prompt_that_is_not_compared_is_counted_once_whoever_dropped_it(
    registry: CollectorRegistry,
) -> None:
    """The scheduler may have a file of its own, beside the workers'."""
    metrics = WorkerMetrics(LABELS, range(5))
    metrics.tell(replace(CONFIG, shadow=0.01))
    assert metrics.shadow is not None
    metrics.shadow.count(0.02, agrees=True)
    metrics.shadow.count(4.0, agrees=False)
    metrics.shadow.dropped.count(definitions.FAILED)
    DroppedCounter.of_scheduler(LABELS).count(definitions.FAILED)
    value = registry.get_sample_value
    assert value("orthorank_shadow_kl_sum", LABELS) == 4.02
    assert value("orthorank_shadow_kl_bucket", {**LABELS, "le": "0.03"}) == 1
    assert value("orthorank_shadow_kl_bucket", {**LABELS, "le": "+Inf"}) == 2
    assert value("orthorank_shadow_comparisons_total", LABELS) == 2
    assert value("orthorank_shadow_top1_agreements_total", LABELS) == 1
    assert value("orthorank_shadow_dropped_total", {**LABELS, "reason": "failed"}) == 2
    assert value("orthorank_shadow_dropped_total", {**LABELS, "reason": "busy"}) == 0


def test_a_worker_without_a_folder_stops_the_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(collector.FOLDER_VARIABLE, raising=False)
    with pytest.raises(RuntimeError, match=collector.FOLDER_VARIABLE):
        WorkerMetrics(LABELS, range(5))
