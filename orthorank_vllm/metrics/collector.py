"""The folder through which metrics cross from the workers to `/metrics`.

The workers count, and may be other processes than the one that answers `/metrics`. Each writes its
counts to a file (`layout`), and the server reads them all when it is scraped. The server makes the
folder before it starts the engine and names it in ORTHORANK_METRICS_DIR, which every child process
inherits; several API servers share their parent's. It is never PROMETHEUS_MULTIPROC_DIR, where one
broken file would take all of vLLM's metrics down. Whatever is wrong with the folder, vLLM's metrics
are served, `orthorank_up` is 0, and the log says why.
"""

import multiprocessing
import os
import shutil
import weakref
from collections.abc import Iterable

from prometheus_client import REGISTRY, Metric
from prometheus_client.core import GaugeMetricFamily

from orthorank_vllm.metrics import definitions, layout
from orthorank_vllm.metrics.complaints import Complaints, logger
from orthorank_vllm.metrics.merging import merged
from orthorank_vllm.metrics.shared_folders import make_shared, open_own, places

FOLDER_VARIABLE = "ORTHORANK_METRICS_DIR"
MODEL_VARIABLE = "ORTHORANK_METRICS_MODEL"
SHARED_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


class FolderCollector:
    """Reads the workers' files whenever the registry is scraped.

    Attributes:
        model_names: whose counts are to be expected.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.model_names: set[str] = set()
        self._process = os.getpid()
        self._complaints = Complaints()

    def describe(self) -> list[Metric]:
        """Describe nothing: else the registry would collect before there is anything."""
        return []

    def collect(self) -> list[Metric]:
        """The metrics that could be read, and `orthorank_up`: whether that was all of them."""
        if os.getpid() != self._process:
            return []  # a fork's copy of the registry
        found: list[Metric] = []
        try:
            found, problems = _read(self.path)
        except Exception as error:  # nothing of ours may take vLLM's metrics down
            problems = [f"{type(error).__name__}: {error}"]
        if problems:
            self._complaints.warn(
                problems[0],
                "OrthoRank's metrics are not whole (orthorank_up 0), in %s: %s",
                self.path,
                "; ".join(problems[:3]),
            )
        is_up = GaugeMetricFamily(
            definitions.UP, definitions.HELP[definitions.UP], labels=["model_name"]
        )
        for model_name in sorted(self.model_names):
            is_up.add_metric([model_name], float(not problems))
        return [is_up, *found]


_collector: FolderCollector | None = None


def prepare_server(model_name: str, cache_root: str) -> None:
    """Make the way from the workers to this process's registry, before they start.

    Args:
        model_name: as it is served.
        cache_root: for the folder, where there is no better place.
    """
    global _collector
    collector = _reader()
    if collector is None:
        collector = _collector = _with_new_folder(cache_root)
        REGISTRY.register(collector)
    collector.model_names.add(model_name)
    os.environ[FOLDER_VARIABLE] = collector.path
    os.environ[MODEL_VARIABLE] = model_name


def metrics_folder() -> str | None:
    """Where this process's server and workers keep their counts; None if OrthoRank is off."""
    return os.environ.get(FOLDER_VARIABLE)


def orthorank_metrics() -> list[Metric]:
    """What the workers have counted so far; to be called in a process that serves HTTP."""
    collector = _reader()
    return [] if collector is None else collector.collect()


def beside_vllms(folder: str | None, metrics: Iterable[Metric]) -> list[Metric]:
    """The metrics of PROMETHEUS_MULTIPROC_DIR, and OrthoRank's.

    Args:
        folder: whose metrics these are; another than vLLM's gets nothing added.
    """
    collector = _reader()
    if collector is None or folder != os.environ.get(SHARED_FOLDER_VARIABLE):
        return list(metrics)
    # An earlier version wrote ours there, and nobody may have emptied it.
    vllms = [metric for metric in metrics if not metric.name.startswith("orthorank_")]
    return [*vllms, *collector.collect()]


def _reader() -> FolderCollector | None:
    """This process's; in one of several API servers that of its parent, whose the engines are.

    Such a process has not read the flags: vLLM loads its plugins after them there.
    """
    global _collector
    path = os.environ.get(FOLDER_VARIABLE)
    is_one_of_several = (
        SHARED_FOLDER_VARIABLE in os.environ and multiprocessing.parent_process() is not None
    )
    if _collector is None and is_one_of_several and path:
        _collector = FolderCollector(path)
        _collector.model_names.add(os.environ.get(MODEL_VARIABLE, ""))
    return _collector


def _with_new_folder(cache_root: str) -> FolderCollector:
    path, lock, problems = make_shared(places(cache_root))
    collector = FolderCollector(path)
    weakref.finalize(collector, _remove, path, lock, os.getpid())
    if lock is None:
        logger.warning(
            "OrthoRank found no place for its metrics (%s): /metrics lacks them until there is one "
            "at %s.",
            "; ".join(problems),
            path,
        )
    return collector


def _remove(path: str, lock: int | None, process: int) -> None:
    if os.getpid() != process:
        return
    shutil.rmtree(path, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _read(path: str) -> tuple[list[Metric], list[str]]:
    """What could be read, and what was wrong with the rest."""
    try:
        folder = open_own(path)
    except OSError as error:
        return [], [f"the folder cannot be read ({error.strerror})"]
    files, problems = [], []
    try:
        for name in sorted(os.listdir(folder)):
            if not name.endswith(layout.SUFFIX):
                continue
            try:
                files.append(layout.read(folder, name))
            except OSError as error:
                problems.append(f"{name}: {error.strerror}")
            except (ValueError, KeyError, TypeError) as error:
                problems.append(f"{name}: {error}")
    finally:
        os.close(folder)
    if not files and not problems:
        problems.append("no worker has its counts there")
    return merged(files), problems
