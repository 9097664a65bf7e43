"""The Triton kernel: attention of any queries, each with a position of its own, over paged K and V.

Stock kernels take a request's queries to be neighbours (`position = context length + row`). Here a
query's position is read, and everything else follows from it: which keys are visible, and where the
loop over them begins and ends. Knows nothing of vLLM.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from orthorank_vllm.attention.paged_loop import WARPS, loop_of, shared_memory
from orthorank_vllm.attention.paged_merge import merge, partials
from orthorank_vllm.attention.tiles import TILE_ROWS, Tiles


@dataclass(frozen=True)
class PagedCache:
    """K and V of one layer.

    Attributes:
        key, value: [pages, page size, kv heads, head size], by any strides but 1 for the last
            dimension.
        block_table: [requests, pages] int32, the pages of each request in order.
        key_scale, value_scale: [] or [kv heads] float32, what stored values are to be multiplied
            with; None: nothing.
    """

    key: torch.Tensor
    value: torch.Tensor
    block_table: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None


def attend(
    query: torch.Tensor,
    positions: torch.Tensor,
    tiles: Tiles,
    cache: PagedCache,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attend from queries at positions of their own to keys in vLLM's pages.

    Args:
        query: [queries, heads, head size], the last dimension dense.
        positions: [queries] int64; a query sees its request's keys up to and with its own position.
        tiles: see `make_tiles`; within a tile positions ascend.
        window: keys that a query sees, its own included; 0: all.
        softcap: largest absolute score, by a tangent; 0: no limit.

    Returns:
        [queries, heads, head size].
    """
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not len(tiles.programs):
        return output
    kv_heads, head_size = cache.key.shape[2:]
    group_size = query.shape[1] // kv_heads
    head_padded = max(triton.next_power_of_2(head_size), 16)
    rows = max(TILE_ROWS, triton.next_power_of_2(group_size))
    keys, stages = loop_of(rows, head_padded * query.element_size(), shared_memory(query.device))
    has_scales = cache.key_scale is not None and cache.value_scale is not None
    # A pointer has to be given in any case.
    key_scale = cache.key_scale if cache.key_scale is not None else query
    value_scale = cache.value_scale if cache.value_scale is not None else query
    # Of keys in parts: what each found, its largest score and the sum of its weights.
    has_parts = tiles.num_partials > 0
    partial = sums = output
    if has_parts:
        partial, sums = partials(tiles.num_partials, query.shape[1], head_size, query.device)
    _attend[(kv_heads, len(tiles.programs))](
        output,
        partial,
        sums,
        query,
        cache.key,
        cache.value,
        positions,
        tiles.programs,
        cache.block_table,
        key_scale,
        value_scale,
        scale,
        softcap,
        query.stride(0),
        query.stride(1),
        output.stride(0),
        output.stride(1),
        *cache.key.stride()[:3],
        *cache.value.stride()[:3],
        cache.block_table.stride(0),
        PAGE=cache.key.shape[1],
        GROUP=group_size,
        HEAD=head_size,
        HEAD_PADDED=head_padded,
        ROWS=rows,
        KEYS=keys,
        WINDOW=window,
        HAS_SCALES=has_scales,
        SCALE_PER_HEAD=has_scales and key_scale.numel() > 1,
        HAS_SOFTCAP=softcap > 0,
        HAS_PARTS=has_parts,
        num_warps=WARPS,
        num_stages=stages,
    )
    if has_parts:
        merge(output, partial, sums, tiles.merges)
    return output


# Triton types a kernel's arguments itself, all that are not constexpr. What may differ from step to
# step is not told apart: it would compile anew, in mid-service.
@triton.jit(do_not_specialize=["table_row"])
def _attend(  # type: ignore[no-untyped-def]
    output_ptr,
    partial_ptr,
    sum_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    position_ptr,
    tile_ptr,
    table_ptr,
    key_scale_ptr,
    value_scale_ptr,
    scale,
    softcap,
    query_row,
    query_head,
    output_row,
    output_head,
    key_page,
    key_slot,
    key_head,
    value_page,
    value_slot,
    value_head,
    table_row,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    SCALE_PER_HEAD: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_PARTS: tl.constexpr,
):
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    tile_ptr += tile * 6
    request = tl.load(tile_ptr)
    first = tl.load(tile_ptr + 1)
    count = tl.load(tile_ptr + 2)

    row = tl.arange(0, ROWS)
    query_index = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = row // GROUP < count
    dim = tl.arange(0, HEAD_PADDED)
    is_dim = dim < HEAD
    # A row that does not exist is before every key.
    position = tl.load(position_ptr + query_index, mask=is_row, other=-1)
    query = tl.load(
        query_ptr + query_index[:, None] * query_row + head[:, None] * query_head + dim[None, :],
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )
    if HAS_SCALES:
        scale_index = kv_head if SCALE_PER_HEAD else 0
        scale = scale * tl.load(key_scale_ptr + scale_index)
        value_scale = tl.load(value_scale_ptr + scale_index)

    first_position = tl.load(position_ptr + first).to(tl.int32)
    end = tl.load(position_ptr + first + count - 1).to(tl.int32) + 1
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(first_position - WINDOW + 1, 0)
    # Up to here every query sees every key.
    common_end = lowest if WINDOW > 0 else (first_position + 1) // KEYS * KEYS

    begin = lowest
    stop = end
    if HAS_PARTS:
        part = tl.load(tile_ptr + 3).to(tl.int32)
        parts = tl.load(tile_ptr + 4).to(tl.int32)
        stretch = tl.cdiv(tl.cdiv(end - lowest, parts), KEYS) * KEYS
        begin = lowest + part * stretch
        stop = tl.minimum(begin + stretch, end)

    table_ptr += request * table_row
    key_ptr += kv_head * key_head
    value_ptr += kv_head * value_head
    maximum = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    result = tl.zeros([ROWS, HEAD_PADDED], dtype=tl.float32)
    for start in tl.range(begin, tl.minimum(stop, common_end), KEYS):
        maximum, total, result = _step(
            maximum, total, result, query, position, start, end,
            key_ptr, value_ptr, table_ptr, scale, softcap,
            key_page, key_slot, value_page, value_slot,
            dim, is_dim, PAGE, KEYS, WINDOW, HAS_SOFTCAP, False,
        )  # fmt: skip
    for start in tl.range(tl.maximum(begin, common_end), stop, KEYS):
        maximum, total, result = _step(
            maximum, total, result, query, position, start, end,
            key_ptr, value_ptr, table_ptr, scale, softcap,
            key_page, key_slot, value_page, value_slot,
            dim, is_dim, PAGE, KEYS, WINDOW, HAS_SOFTCAP, True,
        )  # fmt: skip

    if HAS_SCALES:
        result = result * value_scale
    if HAS_PARTS:
        place = tl.load(tile_ptr + 5) + row // GROUP
        place = place * (tl.num_programs(0) * GROUP) + head
        # A tile is whole or in parts, with all of its rows.
        partial_rows = tl.where(parts > 1, count, 0)
        is_partial = row // GROUP < partial_rows
        tl.store(sum_ptr + place * 2, maximum, mask=is_partial)
        tl.store(sum_ptr + place * 2 + 1, total, mask=is_partial)
        tl.store(
            partial_ptr + place[:, None] * HEAD + dim[None, :],
            result,
            mask=is_partial[:, None] & is_dim[None, :],
        )
        is_row = row // GROUP < count - partial_rows
    result = result / total[:, None]
    tl.store(
        output_ptr + query_index[:, None] * output_row + head[:, None] * output_head + dim[None, :],
        result.to(output_ptr.dtype.element_ty),
        mask=is_row[:, None] & is_dim[None, :],
    )


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    maximum, total, result, query, position, start, end,
    key_ptr, value_ptr, table_ptr, scale, softcap,
    key_page, key_slot, value_page, value_slot,
    dim, is_dim,
    PAGE: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One stretch of keys: the softmax so far, its sum and its product, brought up to date."""
    key_position = start + tl.arange(0, KEYS)
    # Beyond `end` pages may hold anything, NaN too, which a weight of 0 would not silence.
    is_key = key_position < end
    page = tl.load(table_ptr + key_position // PAGE, mask=is_key, other=0).to(tl.int64)
    slot = key_position % PAGE
    key = tl.load(
        key_ptr + (page * key_page + slot * key_slot)[None, :] + dim[:, None],
        mask=is_key[None, :] & is_dim[:, None],
        other=0.0,
    ).to(query.dtype)
    # "ieee" concerns float32 alone, which would be rounded to 10 bits otherwise.
    scores = tl.dot(query, key, input_precision="ieee") * scale
    if HAS_SOFTCAP:
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
    if MASKED:
        visible = key_position[None, :] <= position[:, None]
        if WINDOW > 0:
            visible &= position[:, None] - key_position[None, :] < WINDOW
        scores = tl.where(visible, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # Of a row that has seen no key yet, -inf minus -inf would be NaN.
    base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2((scores - base[:, None]) * 1.4426950408889634)
    shrink = tl.exp2((maximum - base) * 1.4426950408889634)
    value = tl.load(
        value_ptr + (page * value_page + slot * value_slot)[:, None] + dim[None, :],
        mask=is_key[:, None] & is_dim[None, :],
        other=0.0,
    ).to(query.dtype)
    total = total * shrink + tl.sum(weights, 1)
    result = tl.dot(
        weights.to(query.dtype), value, result * shrink[:, None], input_precision="ieee"
    )
    return new_maximum, total, result
