"""The selection rule: which tokens a selective layer updates.

Rules 1 to 4 of README.md, "The selection rule"; arXiv 2507.03865, section 4,
with windows added. Device tensors only, no synchronisation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from orthorank_vllm.selection.plan import Ints, Plan
from orthorank_vllm.selection.quotas import Quota


@dataclass(frozen=True)
class SegmentedTopK:
    """A plan's arrays with one quota on the device, all int64; see `plan.Plan`.

    Attributes:
        pair: [C] candidate and its own request's sink, as an index into all [tokens, R] pairs.
        rank: [C] what orders candidates before their scores do: the segment, in the upper half.
        top_k_slots: [K].
    """

    candidates: torch.Tensor
    pair: torch.Tensor
    rank: torch.Tensor
    forced_rows: torch.Tensor
    top_k_slots: torch.Tensor

    @staticmethod
    def arrays_of(plan: Plan) -> tuple[Ints, ...]:
        """The attributes on the host, in order, the last one for each of `plan.scored`."""
        pair = plan.candidates * len(plan.requests) + plan.request
        slots = (quota.top_k_slots for quota in plan.scored)
        return plan.candidates, pair, plan.segment << 32, plan.forced_rows, *slots

    @classmethod
    def of_arrays(cls, plan: Plan, arrays: Sequence[torch.Tensor]) -> "dict[Quota, SegmentedTopK]":
        """What is needed of a plan on the device, by quota.

        Args:
            arrays: those of `arrays_of`, on the device.
        """
        candidates, pair, rank, forced_rows, *slots_of_quota = arrays
        return {
            quota: cls(candidates, pair, rank, forced_rows, slots)
            for quota, slots in zip(plan.scored, slots_of_quota, strict=True)
        }

    @classmethod
    def of(cls, plan: Plan, device: torch.device) -> "dict[Quota, SegmentedTopK]":
        return cls.of_arrays(plan, to_device(cls.arrays_of(plan), device))

    def rows(
        self, residual: torch.Tensor, sink_rows: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """Rows to update, ascending: see `select`.

        Args:
            residual: [tokens, hidden] residual stream that enters the layer.
            sink_rows: [capacity, hidden] states of position 0 there.
            slots: [R] int64, each request's place among them.

        Returns:
            [quota.num_selected] int64.
        """
        return select(score(residual, sink_rows.index_select(0, slots), self), self)

    def rows_by_error(self, errors: torch.Tensor) -> torch.Tensor:
        """Rows to update, ascending: those of which most would be missed.

        Args:
            errors: see `score_errors`.
        """
        return select(score_errors(errors, self.candidates), self)


def score(residual: torch.Tensor, sinks: torch.Tensor, top_k: SegmentedTopK) -> torch.Tensor:
    """`|cos|` of each candidate to its request's sink, times that sink's length (rules 1 and 2).

    Lower is more important. The length is the same for all that compete with each other.

    Args:
        residual: [tokens, hidden] residual stream that enters the layer.
        sinks: [R, hidden] the same for each request's position 0.

    Returns:
        [C] float32.
    """
    residual = residual.float()
    # Against every sink: cheaper than a copy of each token's own, for all but
    # hundreds of prompts in one forward.
    products = (
        residual.mv(sinks[0].float())[:, None] if len(sinks) == 1 else residual @ sinks.float().T
    )
    products.div_(torch.linalg.vector_norm(residual, dim=-1, keepdim=True))
    return products.flatten().index_select(0, top_k.pair).abs_()


def score_errors(errors: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """The score of tokens that are chosen by what would be missed of them, without a sink.

    Args:
        errors: [tokens] float32, logarithms.
        candidates: [C] int64.

    Returns:
        [C] float32, not negative; lower is more important.
    """
    return errors.index_select(0, candidates).neg_().exp_()


def select(scores: torch.Tensor, top_k: SegmentedTopK) -> torch.Tensor:
    """Rows to update, ascending (rules 3 and 4).

    Args:
        scores: [C] float32, not negative.

    Returns:
        [quota.num_selected] int64.
    """
    # On so few numbers numpy's operations, on the same memory, take two thirds of torch's time.
    return (select_by_numpy if scores.is_cpu else select_by_torch)(scores, top_k)


def select_by_torch(scores: torch.Tensor, top_k: SegmentedTopK) -> torch.Tensor:
    """Select by torch, on any device (rules 3 and 4)."""
    # Floats that are not negative are ordered like their bits, and leave the sign bit free.
    by_segment_and_score = (top_k.rank | scores.view(torch.int32)).argsort(stable=True)
    chosen = by_segment_and_score.index_select(0, top_k.top_k_slots)
    chosen = top_k.candidates.index_select(0, chosen)
    return torch.cat([chosen, top_k.forced_rows]).sort().values


def select_by_numpy(scores: torch.Tensor, top_k: SegmentedTopK) -> torch.Tensor:
    """Select by numpy, on CPU, in the steps of `select_by_torch` (rules 3 and 4)."""
    rank, candidates = top_k.rank.numpy(), top_k.candidates.numpy()
    by_segment_and_score = (rank | scores.numpy().view(np.int32)).argsort(kind="stable")
    chosen = candidates[by_segment_and_score[top_k.top_k_slots.numpy()]]
    rows = np.concatenate([chosen, top_k.forced_rows.numpy()])
    rows.sort()
    return torch.from_numpy(rows)


def to_device(arrays: Sequence[Ints], device: torch.device) -> list[torch.Tensor]:
    """The arrays on the device, in one copy that nobody waits for.

    From pinned memory, which torch takes back once the copy is done: from any other, and with
    one copy for each array, the host would wait for the device at every forward.

    Args:
        arrays: int64, of one dimension.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    packed = torch.from_numpy(pack(arrays)).pin_memory()
    return unpack(packed.to(device, non_blocking=True), arrays)


def pack(arrays: Sequence[Ints]) -> Ints:
    """The arrays in one, each from a multiple of 16 bytes on.

    Triton compiles a kernel anew for a pointer that is no such multiple, which would depend on
    the lengths of the others.
    """
    starts = _aligned_starts(arrays)
    packed = np.zeros(starts[-1], dtype=np.int64)
    for start, array in zip(starts, arrays, strict=False):
        packed[start : start + len(array)] = array
    return packed


def unpack(packed: torch.Tensor, arrays: Sequence[Ints]) -> list[torch.Tensor]:
    """The arrays, by views of what `pack` made of them."""
    starts = _aligned_starts(arrays)
    return [
        packed.narrow(0, start, len(array)) for start, array in zip(starts, arrays, strict=False)
    ]


def _aligned_starts(arrays: Sequence[Ints]) -> list[int]:
    """Where each array begins, and the end."""
    return list(accumulate((len(array) + len(array) % 2 for array in arrays), initial=0))
