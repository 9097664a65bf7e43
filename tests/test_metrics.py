"""The way of the counts from a worker process to the server's registry."""

import multiprocessing
import os
from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from orthorank_vllm import metrics

LABELS = {"model_name": "m", "engine": "0"}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(metrics.SHARED_FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(metrics, "_collector", None)
    yield
    if metrics._collector is not None:
        REGISTRY.unregister(metrics._collector)


def count_in_worker(*counts: int) -> None:
    worker = metrics.WorkerMetrics("m", "0")
    worker.count(*counts)
    worker.count(*counts)


def run_elsewhere(*counts: int) -> None:
    process = multiprocessing.get_context("spawn").Process(target=count_in_worker, args=counts)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_counts_of_another_process_reach_the_servers_registry() -> None:
    """Break seen: the folder's name not handed on to the worker."""
    metrics.prepare_server()
    run_elsewhere(10, 200, 100)
    value = REGISTRY.get_sample_value
    assert value("orthorank_prefill_tokens_total", LABELS) == 20
    assert value("orthorank_token_updates_total", LABELS) == 400
    assert value("orthorank_token_updates_skipped_total", LABELS) == 200
    assert value("orthorank_active", LABELS) == 1


def test_counts_of_this_process_reach_the_registry_too() -> None:
    metrics.prepare_server()
    count_in_worker(1, 2, 3)
    assert REGISTRY.get_sample_value("orthorank_token_updates_skipped_total", LABELS) == 6


def test_counters_are_zero_before_the_first_prompt() -> None:
    metrics.prepare_server()
    metrics.WorkerMetrics("m", "0")
    assert REGISTRY.get_sample_value("orthorank_prefill_tokens_total", LABELS) == 0


def test_a_shared_folder_is_used_where_there_is_one(
    tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with several API servers, where vLLM's own `/metrics` merges the folder."""
    monkeypatch.setenv(metrics.SHARED_FOLDER_VARIABLE, os.fspath(tmp_path))
    metrics.prepare_server()
    assert metrics._collector is None
    run_elsewhere(10, 200, 100)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, os.fspath(tmp_path))
    assert registry.get_sample_value("orthorank_prefill_tokens_total", LABELS) == 20
    assert registry.get_sample_value("orthorank_active", LABELS) == 1


def test_two_engines_of_one_server_share_its_folder() -> None:
    metrics.prepare_server()
    first = os.environ[metrics.FOLDER_VARIABLE]
    metrics.prepare_server()
    assert os.environ[metrics.FOLDER_VARIABLE] == first


def test_a_worker_without_a_folder_stops_the_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(metrics.FOLDER_VARIABLE, raising=False)
    with pytest.raises(RuntimeError, match=metrics.FOLDER_VARIABLE):
        metrics.WorkerMetrics("m", "0")
