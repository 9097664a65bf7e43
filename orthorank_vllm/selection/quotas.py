"""How many tokens of each segment a selective layer chooses (README.md, "The selection rule", 3).

A request may skip tokens in fewer layers than others of its batch: in the first ones of their
order. In a layer beyond those all of its tokens are chosen, so one plan serves the whole batch.
Layers that choose alike share a quota: those with one keep, where the same requests skip.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Quota:
    """How many of each segment are chosen in some of the layers.

    Attributes:
        top_k: [segments]; all of it where its request skips nothing there.
        top_k_slots: [K] for candidates sorted by (segment, score): which to take.
        selected_per_request: [batch] selected rows of each request, the forced ones included.
        rows: [selected] these, ascending, where no score decides; None where one does.
    """

    top_k: Ints
    top_k_slots: Ints
    selected_per_request: Ints
    rows: Ints | None

    @cached_property
    def num_selected(self) -> int:
        """Rows that such a layer updates."""
        return int(self.selected_per_request.sum())


class Competition(NamedTuple):
    """What compete with each other: runs of neighbouring candidates, the segments.

    Attributes:
        candidates: [C] rows to choose from, ascending.
        forced_rows: [A] all other rows, ascending.
        forced_per_request: [batch] how many those are.
        start: [segments] index of the first one among the candidates.
        size: [segments].
        request: [segments] index in the batch.
    """

    candidates: Ints
    forced_rows: Ints
    forced_per_request: Ints
    start: Ints
    size: Ints
    request: Ints


def make_quotas(
    rivals: Competition, keeps: Sequence[float], num_selective: Ints | None
) -> list[Quota | None]:
    """The quota of each selective layer, in their order; None where no request skips anything.

    Args:
        keeps: of each layer.
        num_selective: [batch] how many of the layers, the first ones, skip tokens of each request;
            None: all of them.
    """
    of_segment = None if num_selective is None else num_selective[rivals.request]
    counts = [len(keeps)] if of_segment is None else np.unique(of_segment).tolist()
    made: dict[tuple[float, int], Quota] = {}
    quotas: list[Quota | None] = []
    for place, keep in enumerate(keeps):
        passed = bisect_right(counts, place)
        if passed == len(counts):
            quotas.append(None)
            continue
        if (keep, passed) not in made:
            skips = None if of_segment is None or not passed else of_segment > place
            made[keep, passed] = _quota(rivals, keep, skips)
        quotas.append(made[keep, passed])
    return quotas


def _quota(rivals: Competition, keep: float, skips: Bools | None) -> Quota:
    """The counts of rule 3.

    Args:
        skips: [segments] whether its request skips tokens; None: all do.
    """
    top_k = np.ceil(keep * rivals.size - 1e-9).astype(np.int64)
    is_scored = top_k.any() if skips is None else top_k[skips].any()
    if skips is not None:
        top_k = np.where(skips, top_k, rivals.size)
    slots = expand(rivals.start, top_k)
    chosen = np.bincount(rivals.request, top_k, minlength=len(rivals.forced_per_request))
    rows = None
    if not is_scored:
        whole = rivals.candidates[slots]
        rows = np.sort(np.append(whole, rivals.forced_rows)) if len(whole) else rivals.forced_rows
    return Quota(top_k, slots, chosen.astype(np.int64) + rivals.forced_per_request, rows)


def expand(first: Ints, count: Ints) -> Ints:
    """`first[i], first[i] + 1, …`, `count[i]` of them for each i, one after the other."""
    before = np.cumsum(count) - count
    return np.arange(count.sum()) + np.repeat(first - before, count)
