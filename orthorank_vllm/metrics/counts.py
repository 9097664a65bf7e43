"""Counters, gauges and histograms of one worker: in its memory, with a copy in a file.

Whatever happens to the file, counting goes on; as soon as it can be, the file is there again, with
all that was counted meanwhile.
"""

import itertools
import os
import threading
import time
import weakref
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from orthorank_vllm.metrics import layout
from orthorank_vllm.metrics.complaints import Complaints
from orthorank_vllm.metrics.shared_folders import open_shared

# How often the file is looked after, beside the steps.
CHECK_SECONDS = 5.0


class Counts:
    """All numbers of one worker."""

    _numbers = itertools.count()

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._name = self._new_name()
        self._series: list[layout.Series] = []
        self._values = array("d")
        self._header = b""
        self._since = time.time()
        self._process = os.getpid()
        self._complaints = Complaints()
        self._has_failed = False
        # For `publish`, which the keeper calls too. A step takes no lock: its descriptor stays the
        # same, whichever file it stands for.
        self._lock = threading.Lock()
        self._file = os.open(os.devnull, os.O_RDWR)
        self._hold = os.open(os.devnull, os.O_RDWR)
        for descriptor in (self._file, self._hold):
            # Not at exit, when the keeper may still use it.
            weakref.finalize(self, os.close, descriptor).atexit = False

    @property
    def path(self) -> Path:
        """Where the file is, or will be."""
        return Path(self._folder) / self._name

    def _new_name(self) -> str:
        # The number is for several engines in one process.
        return f"orthorank-{os.getpid()}-{next(self._numbers)}{layout.SUFFIX}"

    def add(self, series: layout.Series) -> int:
        """Where its numbers begin, all 0; the file has them once it is published."""
        with self._lock:
            self._series.append(series)
            first = len(self._values)
            self._values.extend([0.0] * series.size)
            return first

    def increase(self, index: int, amount: float) -> None:
        self._values[index] += amount

    def set(self, index: int, value: float) -> None:
        self._values[index] = value

    def write(self) -> None:
        """Show what was counted so far: one call, which never fails."""
        try:
            os.pwrite(self._file, self._values, len(self._header))
        except OSError:
            self._has_failed = True

    def publish(self) -> None:
        """Make the file, now and whenever it is lost; where that fails the keeper tries again."""
        with self._lock:
            self._header = layout.header_of(self._series, self._since)
            self._try_to_make()
        _keep(self)

    def look_after(self) -> None:
        """Make the file anew if it is lost or broken."""
        # A fork's copy of the counts is not the worker's.
        if os.getpid() != self._process:
            return
        with self._lock:
            if self._has_failed or not self._is_whole():
                self._try_to_make()

    def _is_whole(self) -> bool:
        try:
            there, ours = os.stat(self.path, follow_symlinks=False), os.fstat(self._file)
            size = len(self._header) + len(self._values) * self._values.itemsize
            return (
                os.path.samestat(there, ours)
                and there.st_size == size
                and os.pread(self._file, len(self._header), 0) == self._header
            )
        except OSError:
            return False

    def _try_to_make(self) -> None:
        try:
            self._make()
            self._has_failed = False
        except OSError as error:
            self._has_failed = True
            # Numbers that stand still would look like a server without requests.
            with suppress(OSError):
                self.path.unlink()
            self._complaints.warn(
                str(error.errno),
                "OrthoRank counts in memory and cannot write to %s (%s): /metrics lacks it until "
                "that is possible again.",
                self._folder,
                error.strerror,
            )

    def _make(self) -> None:
        folder = open_shared(self._folder)
        try:
            if os.path.isdir(self.path):
                self._name = self._new_name()
            unfinished = f"{self._name}.new"
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            file = os.open(unfinished, flags, 0o600, dir_fd=folder)
            try:
                _write_all(file, self._header + self._values.tobytes())
                os.rename(unfinished, self._name, src_dir_fd=folder, dst_dir_fd=folder)
                os.dup2(file, self._file, inheritable=False)
            except OSError:
                with suppress(OSError):
                    os.unlink(unfinished, dir_fd=folder)
                raise
            finally:
                os.close(file)
            os.dup2(folder, self._hold, inheritable=False)
        finally:
            os.close(folder)
        # What was counted since `tobytes`.
        self.write()


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


_kept: "weakref.WeakSet[Counts]" = weakref.WeakSet()
_keeper: threading.Thread | None = None
_keeping = threading.Lock()


def _keep(counts: Counts) -> None:
    global _keeper
    with _keeping:
        _kept.add(counts)
        # A fork has no threads but its own.
        if _keeper is None or not _keeper.is_alive():
            name = "orthorank-metrics"
            _keeper = threading.Thread(target=_look_after_all, name=name, daemon=True)
            _keeper.start()


def _look_after_all() -> None:
    while True:
        time.sleep(CHECK_SECONDS)
        _look_after_each()


def _look_after_each() -> None:
    with _keeping:
        kept = list(_kept)
    for counts in kept:
        counts.look_after()


class Counter:
    """A sum that is there, as 0, before anything is counted."""

    def __init__(self, counts: Counts, name: str, labels: Mapping[str, str]) -> None:
        self._counts = counts
        self._index = counts.add(layout.Series(name, layout.COUNTER, labels))

    def add(self, amount: float) -> None:
        self._counts.increase(self._index, amount)


class Histogram:
    """How often a value fell between two bounds, and the sum of all values."""

    def __init__(
        self, counts: Counts, name: str, labels: Mapping[str, str], bounds: Sequence[float]
    ) -> None:
        """Add a histogram's numbers to the file.

        Args:
            bounds: ascending; above the last one there is one more bucket.
        """
        self._counts, self._bounds = counts, bounds
        self._first = counts.add(layout.Series(name, layout.HISTOGRAM, labels, bounds))
        self._sum = self._first + len(bounds) + 1

    def observe(self, value: float) -> None:
        self._counts.increase(self._first + bisect_left(self._bounds, value), 1)
        self._counts.increase(self._sum, value)


def write_gauge(counts: Counts, name: str, labels: Mapping[str, str], value: float) -> None:
    """A value that does not change while the engine runs; of several processes' the last holds."""
    counts.set(counts.add(layout.Series(name, layout.GAUGE, labels)), value)
