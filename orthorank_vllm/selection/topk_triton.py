"""The selection rule on a GPU, in two kernels and no sort: the same rows as `topk` gives.

There a selective layer is short, and some thirty small operations would be a part of it that can be
seen. What makes a sort needless: where in the result each window part's winners stand is known on
the host, and so are the rows that are selected anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from orthorank_vllm.selection.plan import Ints, Plan

# Every token of a part is compared with every other, at once.
LARGEST_WINDOW = 256
SCORE_ROWS = 8
SCORE_COLUMNS = 512


@dataclass(frozen=True)
class PartedCompetition:
    """A plan's arrays on the device, all int64; see `plan.Plan`.

    Attributes:
        candidates: [C] rows that compete, ascending, part by part.
        request: [C] index of each one's request.
        parts: [P x 5] of each part its first candidate, its size, how many win, where its winners
            begin in the result, and whether its first candidate is a position 0.
        anyway: [K] the result, but for its winners.
        window: positions per window, from 1 to `LARGEST_WINDOW`.
    """

    candidates: torch.Tensor
    request: torch.Tensor
    parts: torch.Tensor
    anyway: torch.Tensor
    window: int

    @staticmethod
    def arrays_of(plan: Plan) -> tuple[Ints, ...]:
        """The attributes on the host, in order, `parts` as one row."""
        size = np.bincount(plan.part)
        wins = np.bincount(plan.part[plan.winners], minlength=len(size))
        start = np.cumsum(size) - size
        first_row = plan.candidates[start]
        # Within a part's rows only a prompt's last is selected anyway, and that one is its last.
        place = np.cumsum(wins) - wins + np.searchsorted(plan.always, first_row)
        has_sink = np.isin(start, plan.at_position_0)
        parts = np.stack([start, size, wins, place, has_sink], axis=1).astype(np.int64)
        parts_before = np.searchsorted(first_row, plan.always, side="right")
        wins_before = np.concatenate([[0], np.cumsum(wins)])[parts_before]
        anyway = np.zeros(plan.num_selected, dtype=np.int64)
        anyway[np.arange(len(plan.always)) + wins_before] = plan.always
        return plan.candidates, plan.request, parts.ravel(), anyway

    @classmethod
    def of_arrays(cls, plan: Plan, arrays: Sequence[torch.Tensor]) -> "PartedCompetition":
        """
        Args:
            arrays: those of `arrays_of`, on the device.
        """
        candidates, request, parts, anyway = arrays
        return cls(candidates, request, parts, anyway, plan.window)

    def rows(
        self, stream: torch.Tensor, sink_rows: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """See `Competition.rows`."""
        candidates = len(self.candidates)
        scores = torch.empty(candidates, dtype=torch.float32, device=stream.device)
        _score[(triton.cdiv(candidates, SCORE_ROWS),)](
            scores,
            stream,
            sink_rows,
            self.candidates,
            self.request,
            slots,
            candidates,
            stream.shape[1],
            stream.stride(0),
            sink_rows.stride(0),
            ROWS=SCORE_ROWS,
            COLUMNS=SCORE_COLUMNS,
        )
        rows = self.anyway.clone()
        _select[(len(self.parts) // 5,)](
            rows, scores, self.candidates, self.parts, SIZE=triton.next_power_of_2(self.window)
        )
        return rows


@triton.jit
def _score(  # type: ignore[no-untyped-def]
    score_ptr,
    stream_ptr,
    sink_ptr,
    candidate_ptr,
    request_ptr,
    slot_ptr,
    candidates,
    hidden,
    stream_row,
    sink_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    candidate = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_candidate = candidate < candidates
    row = tl.load(candidate_ptr + candidate, mask=is_candidate, other=0)
    request = tl.load(request_ptr + candidate, mask=is_candidate, other=0)
    slot = tl.load(slot_ptr + request)
    product = tl.zeros([ROWS], dtype=tl.float32)
    square = tl.zeros([ROWS], dtype=tl.float32)
    for start in tl.range(0, hidden, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_column = (column < hidden)[None, :] & is_candidate[:, None]
        state = tl.load(
            stream_ptr + (row * stream_row)[:, None] + column[None, :], mask=is_column, other=0.0
        ).to(tl.float32)
        sink = tl.load(
            sink_ptr + (slot * sink_row)[:, None] + column[None, :], mask=is_column, other=0.0
        ).to(tl.float32)
        product += tl.sum(state * sink, 1)
        square += tl.sum(state * state, 1)
    tl.store(score_ptr + candidate, tl.abs(product) / tl.sqrt(square), mask=is_candidate)


@triton.jit
def _select(  # type: ignore[no-untyped-def]
    row_ptr,
    score_ptr,
    candidate_ptr,
    part_ptr,
    SIZE: tl.constexpr,
):
    part = part_ptr + tl.program_id(0) * 5
    first = tl.load(part)
    size = tl.load(part + 1)
    wins = tl.load(part + 2)
    place = tl.load(part + 3)
    has_sink = tl.load(part + 4)
    index = tl.arange(0, SIZE)
    is_there = index < size
    score = tl.load(score_ptr + first + index, mask=is_there, other=float("inf"))
    # Floats that are not negative are ordered like their bits, NaN after all numbers.
    order = score.to(tl.int32, bitcast=True)
    is_last = (index >= size) | ((index == 0) & (has_sink != 0))
    order = tl.where(is_last, 2147483647, order)
    is_before = order[None, :] < order[:, None]
    is_before |= (order[None, :] == order[:, None]) & (index[None, :] < index[:, None])
    rank = tl.sum(is_before.to(tl.int32), 1)
    wins_here = (rank < wins) & is_there
    winner = tl.cumsum(wins_here.to(tl.int32), 0) - 1
    row = tl.load(candidate_ptr + first + index, mask=wins_here, other=0)
    tl.store(row_ptr + place + winner, row, mask=wins_here)
