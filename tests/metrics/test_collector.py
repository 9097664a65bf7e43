"""The way of the counts from a worker process to the server's registry."""

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from multiprocessing import Queue
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter
from prometheus_client.multiprocess import MultiProcessCollector

from orthorank_vllm import plugin
from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.metrics import collector
from orthorank_vllm.metrics.recorder import WorkerMetrics
from orthorank_vllm.options import LayerKeep

LABELS = {"model_name": "m", "engine": "0"}
Told = tuple[float | None, float | None]
CONFIG = OrthoRankConfig(
    ratio_asked=0.3,
    window=128,
    tail=64,
    num_layers=5,
    layers=(LayerKeep(1, 0.25), LayerKeep(3, 0.25)),
    source="profile p",
)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(collector.SHARED_FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(collector, "_collector", None)
    yield
    if collector._collector is not None:
        REGISTRY.unregister(collector._collector)


def prepare_server() -> None:
    collector.prepare_server("m", tempfile.gettempdir())


def work() -> None:
    """Two steps of a worker, in which layers 1 and 3 of five skip 6 and 7 of 10 tokens."""
    worker = WorkerMetrics(LABELS, range(5))
    worker.tell(CONFIG)
    for _ in range(2):
        worker.count_step("sparse", 0.3)
        worker.count_prefill_step("sparse", 10, 0.3, 1e-4)
        worker.count_updates(10, {1: 6, 3: 7})


def work_elsewhere() -> None:
    process = multiprocessing.get_context("spawn").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_counts_of_another_process_reach_the_servers_registry() -> None:
    """Break seen: the folder's name not handed on to the worker."""
    prepare_server()
    work_elsewhere()
    value = REGISTRY.get_sample_value
    assert value("orthorank_prefill_tokens_total", LABELS) == 20
    assert value("orthorank_token_updates_total", LABELS) == 2 * (50 - 13)
    assert value("orthorank_token_updates_skipped_total", LABELS) == 26
    assert value("orthorank_layer_token_updates_total", {**LABELS, "layer": "3"}) == 6
    assert value("orthorank_layer_token_updates_skipped_total", {**LABELS, "layer": "3"}) == 14
    assert value("orthorank_active", LABELS) == 1


def test_counts_of_this_process_reach_the_registry_too() -> None:
    prepare_server()
    work()
    assert REGISTRY.get_sample_value("orthorank_token_updates_skipped_total", LABELS) == 26


def test_a_histogram_crosses_with_its_buckets_accumulated() -> None:
    prepare_server()
    work_elsewhere()
    name, labels = "orthorank_step_duration_seconds", {**LABELS, "path": "sparse"}
    value = REGISTRY.get_sample_value
    assert value(f"{name}_count", labels) == 2
    assert value(f"{name}_sum", labels) == pytest.approx(0.6)
    below = {le: value(f"{name}_bucket", {**labels, "le": le}) for le in ("0.25", "0.5", "+Inf")}
    assert below == {"0.25": 0, "0.5": 2, "+Inf": 2}


def test_two_engines_of_one_server_share_its_folder() -> None:
    prepare_server()
    first = os.environ[collector.FOLDER_VARIABLE]
    prepare_server()
    assert os.environ[collector.FOLDER_VARIABLE] == first


def several_servers(told: "Queue[Told]") -> None:
    """One of two API servers, which vLLM makes by multiprocessing, and which know no options."""
    plugin._show_metrics_of_several_servers()
    count_as_vllm_does()
    # As vLLM answers /metrics then: one collector in a registry of its own.
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    value = registry.get_sample_value
    assert value("orthorank_up", {"model_name": "m"}) == 1
    told.put((value("vllm:requests_total"), value("orthorank_prefill_tokens_total", LABELS)))


def test_several_api_servers_show_their_parents_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nothing of ours is in the folder whose files vLLM merges.

    Break seen: only the process that had read the options knew the folder.
    """
    monkeypatch.setenv("TMPDIR", os.fspath(tmp_path))
    monkeypatch.setenv(collector.SHARED_FOLDER_VARIABLE, os.fspath(tmp_path))
    prepare_server()
    work_elsewhere()
    context = multiprocessing.get_context("spawn")
    told: Queue[Told] = context.Queue()
    for requests in (1, 2):
        server = context.Process(target=several_servers, args=(told,))
        server.start()
        assert told.get(timeout=300) == (requests, 20)
        server.join()
    assert not list(tmp_path.glob("*orthorank*.db"))


def count_as_vllm_does() -> None:
    Counter("vllm:requests", "Some.").inc()


def test_nothing_is_told_where_orthorank_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(collector.FOLDER_VARIABLE, raising=False)
    assert collector.orthorank_metrics() == []


def test_a_worker_on_another_machine_counts_there_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    monkeypatch.setenv(collector.FOLDER_VARIABLE, os.fspath(tmp_path / "not here"))
    work()
    assert "/metrics will lack them" in " ".join(log_lines)
    assert list((tmp_path / "not here").iterdir())
