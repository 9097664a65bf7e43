"""The folder through which metrics cross from the workers to `/metrics`.

The workers count, and may be other processes than the one that answers
`/metrics`. Their counts cross in prometheus-client's own multiprocess files: a
worker writes them (a memory-mapped page, no lock, no call), the server reads
them when it is scraped. If PROMETHEUS_MULTIPROC_DIR is set (by the user, or by
vLLM for several API servers) the files go there and vLLM's own `/metrics`
merges them. If not, the server makes a folder of its own before it starts the
engine, names it in ORTHORANK_METRICS_DIR, which every child process inherits,
and a collector in its registry reads it. vLLM's metrics stay as they are in
both cases.
"""

import os
import tempfile
from collections.abc import Iterable

from prometheus_client import REGISTRY, Metric
from prometheus_client.multiprocess import MultiProcessCollector

FOLDER_VARIABLE = "ORTHORANK_METRICS_DIR"
SHARED_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


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
        return _metrics_in(self._folder.name)


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


def metrics_folder() -> str | None:
    """Where this process's server and workers keep their counts; None if OrthoRank is off."""
    return os.environ.get(SHARED_FOLDER_VARIABLE) or os.environ.get(FOLDER_VARIABLE)


def orthorank_metrics() -> list[Metric]:
    """What the workers have counted so far; to be called in a process that serves HTTP."""
    folder = metrics_folder()
    found = _metrics_in(folder) if folder else []
    return [metric for metric in found if metric.name.startswith("orthorank_")]


def _metrics_in(folder: str) -> Iterable[Metric]:
    collected: Iterable[Metric] = MultiProcessCollector(None, folder).collect()
    return collected
