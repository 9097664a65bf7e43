"""Counters, gauges and histograms in prometheus-client's multiprocess files.

Its own classes choose by an environment variable, when they are imported, whether all metrics of
a process go to such files; vLLM's must not. Adding to one of these is one write to a mapped page.
"""

import itertools
import os
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.utils import floatToGoString

from orthorank_vllm.metrics.names import HELP


def _key(name: str, sample: str, labels: Mapping[str, str]) -> str:
    return mmap_key(name, sample, list(labels), list(labels.values()), HELP[name])


class Files:
    """One worker's files in a folder, one for each kind of metric."""

    _numbers = itertools.count()

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._opened: dict[str, MmapedDict] = {}
        # A process id alone would be prometheus-client's own file where worker and server are one
        # process; the number is for several engines in one.
        self._name = f"orthorank-{os.getpid()}-{next(self._numbers)}.db"

    def of_kind(self, kind: str) -> MmapedDict:
        """
        Args:
            kind: as prometheus-client reads it off the file's name.
        """
        if kind not in self._opened:
            path = self._folder / f"{kind}_{self._name}"
            # Left by an earlier process with this id, as after a container's restart.
            path.unlink(missing_ok=True)
            self._opened[kind] = MmapedDict(os.fspath(path))
        return self._opened[kind]


class _Sum:
    def __init__(self, file: MmapedDict, key: str) -> None:
        self._file, self._key, self._value = file, key, 0.0
        file.write_value(key, 0.0, 0.0)

    def add(self, amount: float) -> None:
        self._value += amount
        self._file.write_value(self._key, self._value, 0.0)


class Counter(_Sum):
    """A sum that is there, as 0, before anything is counted."""

    def __init__(self, files: Files, name: str, labels: Mapping[str, str]) -> None:
        super().__init__(files.of_kind("counter"), _key(name, f"{name}_total", labels))


class Histogram:
    """How often a value fell between two bounds, and the sum of all values."""

    def __init__(
        self, files: Files, name: str, labels: Mapping[str, str], bounds: Sequence[float]
    ) -> None:
        """
        Args:
            bounds: ascending; above the last one there is one more bucket.
        """
        file = files.of_kind("histogram")
        self._bounds = bounds
        self._sum = _Sum(file, _key(name, f"{name}_sum", labels))
        # Each bucket alone: the reader accumulates them.
        self._buckets = [
            _Sum(file, _key(name, f"{name}_bucket", {**labels, "le": floatToGoString(bound)}))
            for bound in (*bounds, float("inf"))
        ]

    def observe(self, value: float) -> None:
        self._buckets[bisect_left(self._bounds, value)].add(1)
        self._sum.add(value)


def write_gauge(files: Files, name: str, labels: Mapping[str, str], value: float) -> None:
    """A value that does not change while the engine runs; of several processes' the last holds."""
    files.of_kind("gauge_mostrecent").write_value(_key(name, name, labels), value, time.time())
