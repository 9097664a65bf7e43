"""The `orthorank_*` metrics, and how they cross from the worker to `/metrics`.

The worker counts, and may be another process than the one that answers
`/metrics`. They cross in prometheus-client's own multiprocess files: the worker
writes them (a memory-mapped page, no lock, no call), the server reads them when
it is scraped. If PROMETHEUS_MULTIPROC_DIR is set (by the user, or by vLLM for
several API servers) the files go there and vLLM's own `/metrics` merges them.
If not, the server makes a folder of its own before it starts the engine, names
it in ORTHORANK_METRICS_DIR, which every child process inherits, and a collector
in its registry reads it. vLLM's metrics stay as they are in both cases.
"""

import os
import tempfile
import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import REGISTRY, Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

FOLDER_VARIABLE = "ORTHORANK_METRICS_DIR"
SHARED_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

ACTIVE = "orthorank_active"
COUNTERS = {
    "orthorank_prefill_tokens": "Prompt tokens that prefill computed.",
    "orthorank_token_updates": "Token updates that prefill computed (prompt tokens x layers).",
    "orthorank_token_updates_skipped": (
        "Token updates that prefill skipped (prompt tokens x layers)."
    ),
}


class _FolderCollector:
    """Reads the workers' files whenever the registry is scraped."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="orthorank-metrics-")
        self._owner = os.getpid()

    def publish(self) -> None:
        """Name the folder to the processes that will be started."""
        os.environ[FOLDER_VARIABLE] = self._folder.name

    def collect(self) -> Iterable[Metric]:
        if os.getpid() != self._owner:
            return []  # a fork's copy of the registry
        collected: Iterable[Metric] = MultiProcessCollector(None, self._folder.name).collect()
        return collected


_collector: _FolderCollector | None = None


def prepare_server() -> None:
    """Make the way from the workers to this process's registry, before they start."""
    global _collector
    if SHARED_FOLDER_VARIABLE in os.environ:
        return
    if _collector is None:
        _collector = _FolderCollector()
        REGISTRY.register(_collector)
    _collector.publish()


class WorkerMetrics:
    """Counts of one engine, written by its first worker."""

    def __init__(self, model_name: str, engine: str) -> None:
        """
        Raises:
            RuntimeError: no folder was prepared by the server process.
        """
        folder = os.environ.get(SHARED_FOLDER_VARIABLE) or os.environ.get(FOLDER_VARIABLE)
        if not folder:
            raise RuntimeError(
                f"OrthoRank's worker has no folder for its metrics: {FOLDER_VARIABLE} was not "
                "handed on by the process that configured the engine"
            )
        labels = ["model_name", "engine"], [model_name, engine]
        # The name after the type is free; a process id alone would be
        # prometheus-client's own file where worker and server are one process.
        name = f"orthorank-{os.getpid()}.db"
        self._counters = MmapedDict(os.path.join(folder, f"counter_{name}"))
        self._gauges = MmapedDict(os.path.join(folder, f"gauge_mostrecent_{name}"))
        self._totals = {
            mmap_key(counter, f"{counter}_total", *labels, text): 0
            for counter, text in COUNTERS.items()
        }
        self._write_totals()
        active_text = "1 if the workers of this engine run OrthoRank."
        self._gauges.write_value(mmap_key(ACTIVE, ACTIVE, *labels, active_text), 1, time.time())

    def count(self, prefill_tokens: int, updates: int, skipped: int) -> None:
        """Add one forward's counts."""
        for key, amount in zip(self._totals, (prefill_tokens, updates, skipped), strict=True):
            self._totals[key] += amount
        self._write_totals()

    def _write_totals(self) -> None:
        for key, total in self._totals.items():
            self._counters.write_value(key, total, 0.0)


def worker_metrics(vllm_config: Any) -> WorkerMetrics:
    """With vLLM's own labels: the served name, and the engine's data parallel rank."""
    return WorkerMetrics(
        model_name=str(vllm_config.model_config.served_model_name),
        engine=str(vllm_config.parallel_config.data_parallel_index),
    )
