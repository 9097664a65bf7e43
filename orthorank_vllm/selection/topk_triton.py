"""The selection rule on a GPU, in two kernels and no sort: the same rows as `topk` gives.

There a selective layer is short, and some thirty small operations would be a part of it that can be
seen. What makes a sort needless: where in the result each segment's top k stand is known on the
host, and so are the rows that are selected in any case.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from orthorank_vllm.selection.plan import Ints, Plan
from orthorank_vllm.selection.quotas import Quota
from orthorank_vllm.selection.topk import score_errors

# Every token of a segment is compared with every other, at once: in four warps that takes 94
# registers a thread at 128 and 234 at 256, by NVIDIA's assembler; at 512 they do not fit.
LARGEST_WINDOW = 256
SCORE_ROWS = 8
SCORE_COLUMNS = 512


@dataclass(frozen=True)
class SegmentedTopKTriton:
    """A plan's arrays with one quota on the device, all int64; see `plan.Plan`.

    Attributes:
        candidates: [C] rows to choose from, ascending, segment by segment.
        request: [C] index of each one's request.
        segments: [P x 4] of each segment its first candidate, its size, how many are chosen, and
            where those begin in the result.
        selected: [K] the result: the rows that are selected in any case are there, and each choice
            writes the others over those of the one before.
        window: positions per window, from 1 to `LARGEST_WINDOW`.
    """

    candidates: torch.Tensor
    request: torch.Tensor
    segments: torch.Tensor
    selected: torch.Tensor
    window: int

    @staticmethod
    def arrays_of(plan: Plan) -> tuple[Ints, ...]:
        """The attributes on the host: the last two, in one row each, for each scored quota."""
        size = np.bincount(plan.segment)
        start = np.cumsum(size) - size
        first_row = plan.candidates[start]
        forced_before = np.searchsorted(plan.forced_rows, first_row)
        segments_before = np.searchsorted(first_row, plan.forced_rows)
        arrays = [plan.candidates, plan.request]
        for quota in plan.scored:
            top_k = quota.top_k
            # A segment's rows are neighbours: none of them is forced.
            place = np.cumsum(top_k) - top_k + forced_before
            arrays.append(np.stack([start, size, top_k, place], axis=1).ravel())
            top_k_before = np.concatenate([[0], np.cumsum(top_k)])[segments_before]
            selected = np.zeros(quota.num_selected, dtype=np.int64)
            selected[np.arange(len(plan.forced_rows)) + top_k_before] = plan.forced_rows
            arrays.append(selected)
        return tuple(arrays)

    @classmethod
    def of_arrays(
        cls, plan: Plan, arrays: Sequence[torch.Tensor]
    ) -> "dict[Quota, SegmentedTopKTriton]":
        """What is needed of a plan on the device, by quota.

        Args:
            arrays: those of `arrays_of`, on the device.
        """
        candidates, request, *of_quota = arrays
        return {
            quota: cls(candidates, request, segments, selected, plan.window)
            for quota, segments, selected in zip(
                plan.scored, of_quota[::2], of_quota[1::2], strict=True
            )
        }

    def rows(
        self, residual: torch.Tensor, sink_rows: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """Rows to update, ascending, until the next choice: by two kernels (rules 1 to 4)."""
        candidates = len(self.candidates)
        scores = torch.empty(candidates, dtype=torch.float32, device=residual.device)
        _score[(triton.cdiv(candidates, SCORE_ROWS),)](
            scores,
            residual,
            sink_rows,
            self.candidates,
            self.request,
            slots,
            candidates,
            residual.shape[1],
            residual.stride(0),
            sink_rows.stride(0),
            ROWS=SCORE_ROWS,
            COLUMNS=SCORE_COLUMNS,
        )
        return self._select(scores)

    def rows_by_error(self, errors: torch.Tensor) -> torch.Tensor:
        """Rows to update, ascending, until the next choice: of which most would be missed.

        Args:
            errors: see `topk.score_errors`.
        """
        return self._select(score_errors(errors, self.candidates))

    def _select(self, scores: torch.Tensor) -> torch.Tensor:
        size = triton.next_power_of_2(self.window)
        _select[(len(self.segments) // 4,)](
            self.selected, scores, self.candidates, self.segments, SIZE=size
        )
        return self.selected


# What differs from step to step is not told apart: Triton would compile anew, in mid-service.
@triton.jit(do_not_specialize=["candidates"])
def _score(  # type: ignore[no-untyped-def]
    score_ptr,
    residual_ptr,
    sink_ptr,
    candidate_ptr,
    request_ptr,
    slot_ptr,
    candidates,
    hidden,
    residual_row,
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
            residual_ptr + (row * residual_row)[:, None] + column[None, :],
            mask=is_column,
            other=0.0,
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
    segment_ptr,
    SIZE: tl.constexpr,
):
    segment = segment_ptr + tl.program_id(0) * 4
    first = tl.load(segment)
    size = tl.load(segment + 1)
    top_k = tl.load(segment + 2)
    place = tl.load(segment + 3)
    index = tl.arange(0, SIZE)
    is_there = index < size
    score = tl.load(score_ptr + first + index, mask=is_there, other=float("inf"))
    # Floats that are not negative are ordered like their bits, NaN after all numbers.
    order = score.to(tl.int32, bitcast=True)
    order = tl.where(is_there, order, 2147483647)
    is_before = order[None, :] < order[:, None]
    is_before |= (order[None, :] == order[:, None]) & (index[None, :] < index[:, None])
    rank = tl.sum(is_before.to(tl.int32), 1)
    is_top_k = (rank < top_k) & is_there
    slot = tl.cumsum(is_top_k.to(tl.int32), 0) - 1
    row = tl.load(candidate_ptr + first + index, mask=is_top_k, other=0)
    tl.store(row_ptr + place + slot, row, mask=is_top_k)
