"""The Triton kernel that makes one softmax of what programs found in parts of a query's keys."""

import torch
import triton
import triton.language as tl


def partials(
    count: int, heads: int, head_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for what parts find: see `merge`.

    Args:
        count: rows of partial results.
    """
    found = torch.empty(count, heads, head_size, dtype=torch.float32, device=device)
    return found, torch.empty(count, heads, 2, dtype=torch.float32, device=device)


def merge(
    output: torch.Tensor, partial: torch.Tensor, sums: torch.Tensor, merges: torch.Tensor
) -> None:
    """Write the rows whose keys were shared.

    Args:
        output: [queries, heads, head size], of which other rows stay as they are.
        partial: [partials, heads, head size] float32, sums of V by weights from each part's
            largest score.
        sums: [partials, heads, 2] float32, that score and the sum of the weights.
        merges: see `tiles.Tiles`.
    """
    heads, head_size = output.shape[1:]
    _merge[(len(merges), heads)](
        output,
        partial,
        sums,
        merges,
        output.stride(0),
        output.stride(1),
        HEADS=heads,
        HEAD=head_size,
        HEAD_PADDED=triton.next_power_of_2(head_size),
        num_warps=1,
    )


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    output_ptr,
    partial_ptr,
    sum_ptr,
    merge_ptr,
    output_row,
    output_head,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
):
    entry = merge_ptr + tl.program_id(0) * 4
    head = tl.program_id(1)
    row = tl.load(entry)
    partial = tl.load(entry + 1)
    step = tl.load(entry + 2)
    parts = tl.load(entry + 3).to(tl.int32)
    dim = tl.arange(0, HEAD_PADDED)
    is_dim = dim < HEAD
    # Of the part with the query's own key, which each query sees, it is a number.
    maximum = tl.full([], float("-inf"), dtype=tl.float32)
    for part in tl.range(0, parts):
        place = (partial + part * step) * HEADS + head
        maximum = tl.maximum(maximum, tl.load(sum_ptr + place * 2))
    total = tl.zeros([], dtype=tl.float32)
    result = tl.zeros([HEAD_PADDED], dtype=tl.float32)
    for part in tl.range(0, parts):
        place = (partial + part * step) * HEADS + head
        weight = tl.exp2((tl.load(sum_ptr + place * 2) - maximum) * 1.4426950408889634)
        total += weight * tl.load(sum_ptr + place * 2 + 1)
        result += weight * tl.load(partial_ptr + place * HEAD + dim, mask=is_dim, other=0.0)
    tl.store(
        output_ptr + row * output_row + head * output_head + dim,
        (result / total).to(output_ptr.dtype.element_ty),
        mask=is_dim,
    )
