"""The file of one worker's counts: what is counted, then the numbers.

A page that is mapped into the memory of a worker would kill it (SIGBUS) where somebody truncates
the file, or the disk is full. So the numbers stand at the end, side by side, and are written with
one call that can only fail.
"""

import json
import math
import os
import stat
import struct
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SUFFIX = ".db"
COUNTER = "counter"
GAUGE = "gauge"
HISTOGRAM = "histogram"

_HEAD = struct.Struct("<8sII")
_MAGIC = b"orthork1"
_LONGEST_HEADER = 1 << 24


class UnreadableError(ValueError):
    """Not a file of counts, or not a whole one; says in what."""


@dataclass(frozen=True)
class Series:
    """One metric with its labels, as the numbers that it takes in a file.

    Attributes:
        bounds: of a histogram's buckets, ascending; above the last one there is one more.
    """

    name: str
    kind: str
    labels: Mapping[str, str]
    bounds: Sequence[float] = field(default=())

    @property
    def size(self) -> int:
        """How many numbers it has: a histogram each bucket's, then the sum."""
        return len(self.bounds) + 2 if self.kind == HISTOGRAM else 1


def header_of(series: Sequence[Series], since: float) -> bytes:
    """What stands before the numbers, which lie at a multiple of 8.

    Args:
        since: of several workers' gauges the latest holds.
    """
    told = {"since": since, "series": [vars(each) for each in series]}
    text = json.dumps(told).encode()
    text += b" " * (-(_HEAD.size + len(text)) % 8)
    return _HEAD.pack(_MAGIC, len(text), zlib.crc32(text)) + text


def read(folder: int, name: str) -> tuple[float, list[Series], list[float]]:
    """Since when, what, and the numbers.

    Args:
        folder: its descriptor.

    Raises:
        UnreadableError: see there.
        OSError: it cannot be opened.
    """
    # What is no file (a pipe, a link) must not be waited for or followed.
    descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableError("not a file")
    with open(descriptor, "rb") as file:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise UnreadableError("empty" if not head else "truncated")
        magic, length, checksum = _HEAD.unpack(head)
        if magic != _MAGIC or length > _LONGEST_HEADER:
            raise UnreadableError("not a file of OrthoRank's counts")
        text = file.read(length)
        if zlib.crc32(text) != checksum:
            raise UnreadableError("truncated or overwritten")
        told = json.loads(text)
        series = [Series(**each) for each in told["series"]]
        size = 8 * sum(each.size for each in series)
        numbers = file.read(size)
    if len(numbers) < size:
        raise UnreadableError("truncated")
    values = array("d", numbers).tolist()
    if not all(map(math.isfinite, values)):
        raise UnreadableError("overwritten")
    return told["since"], series, values
