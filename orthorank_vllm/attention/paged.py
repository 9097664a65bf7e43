"""Attention of any set of queries, for the GPU backends whose pages our kernel can read.

`paged_kernel` does the work; here is what it needs from vLLM: the block table, and the pages by
the views that vLLM's own backends take (vllm/v1/attention/backends/{flash_attn,triton_attn}.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.platforms import current_platform

from orthorank_vllm.attention.kv_cache import between_transfers, write_alone, write_kv
from orthorank_vllm.attention.paged_kernel import PagedCache, attend
from orthorank_vllm.attention.paged_merge import partials
from orthorank_vllm.attention.tiles import (
    MOST_PARTIALS,
    Tiles,
    make_tiles,
    queries_per_tile,
    rehearsed_tiles,
)
from orthorank_vllm.selection.plan import Batch, Ints

# Their metadata have a block table, and their pages are K and V side by side.
BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")
FP8_CACHES = ("fp8", "fp8_e4m3")
PLAIN_CACHES = ("auto", "bfloat16", "float16", "float32")
LARGEST_HEAD = 256


def obstacle(attn: Any) -> str | None:
    """What keeps the kernel from serving a layer, None if nothing does.

    Args:
        attn: vLLM's `Attention` layer.
    """
    backend = attn.attn_backend.get_name()
    if backend not in BACKENDS:
        return f"the attention backend {backend}"
    if attn.kv_cache_dtype not in (*PLAIN_CACHES, *FP8_CACHES):
        return f"a KV cache of {attn.kv_cache_dtype}"
    if attn.head_size > LARGEST_HEAD:
        return f"heads of {attn.head_size}"
    if attn.impl.alibi_slopes is not None:
        return "position by slopes (ALiBi)"
    if attn.impl.sinks is not None:
        return "learned attention sinks"
    return None


def compile_for(layers: Sequence[Any], dtype: torch.dtype) -> bool:
    """Have the kernel compiled in each form that the layers' steps will need, by using it.

    Layers may differ: in their window, their heads, what their pages hold, how these are laid out.

    Args:
        layers: vLLM's `Attention` layers.
        dtype: of what is computed.

    Returns:
        False while there are no pages, whose layout is a part of the form, or while vLLM captures
        a CUDA graph.
    """
    if not all(attn.kv_cache.numel() for attn in layers):
        return False
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return False
    for attn in layers:
        device = attn.kv_cache.device
        # One query that sees one key, of vLLM's null page: whatever that holds, no one reads it.
        query = torch.zeros(1, attn.num_heads, attn.head_size, dtype=dtype, device=device)
        position = torch.zeros(1, dtype=torch.int64, device=device)
        block_table = torch.zeros(1, 1, dtype=torch.int32, device=device)
        for tiles in rehearsed_tiles(device):
            _attend_to_pages(attn, query, position, tiles, attn.kv_cache, block_table)
    return True


class TritonAttention:
    """Attention by a Triton kernel that reads vLLM's pages of K and V."""

    def __init__(self, batch: Batch, rows_per_request: Ints) -> None:
        """Keep what a forward's layers share; tiles are made when one attends.

        Args:
            rows_per_request: [requests] how many queries each has, in batch order.
        """
        self._batch = batch
        self._rows_per_request = rows_per_request
        self._tiles: dict[int, Tiles] = {}

    write = staticmethod(write_alone)

    def run(
        self,
        attn: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Write K and V, then attend to the pages."""
        write_kv(attn, key, value)
        metadata, _, kv_cache, _ = get_attention_context(attn.layer_name)
        query = query.view(-1, attn.num_heads, attn.head_size)
        if metadata is None:  # vLLM measures memory, and there is no cache yet
            partials(MOST_PARTIALS, attn.num_heads, attn.head_size, query.device)
            return torch.zeros_like(query).flatten(1)
        tiles = self._tiles_for(attn.num_heads // attn.num_kv_heads, query.device)
        block_table = metadata.block_table
        attended: torch.Tensor = between_transfers(
            lambda: _attend_to_pages(attn, query, positions, tiles, kv_cache, block_table),
            attn.layer_name,
        )
        return attended.flatten(1)

    def _tiles_for(self, group_size: int, device: torch.device) -> Tiles:
        size = queries_per_tile(group_size)
        if size not in self._tiles:
            batch = self._batch
            self._tiles[size] = make_tiles(
                self._rows_per_request, batch.num_computed, batch.query_len, size, device
            )
        return self._tiles[size]


def _attend_to_pages(
    attn: Any,
    query: torch.Tensor,
    positions: torch.Tensor,
    tiles: Tiles,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    return attend(
        query,
        positions,
        tiles,
        paged_cache(attn, kv_cache, block_table),
        attn.impl.scale,
        window_of(attn.impl),
        float(attn.impl.logits_soft_cap or 0),
    )


def paged_cache(attn: Any, kv_cache: torch.Tensor, block_table: torch.Tensor) -> PagedCache:
    """A layer's pages as the kernel takes them.

    Args:
        kv_cache: [pages, kv heads, page size, 2 x head size], K and V side by side.
    """
    key, value = kv_cache.transpose(1, 2).split(attn.head_size, dim=-1)
    if attn.kv_cache_dtype not in FP8_CACHES:
        return PagedCache(key, value, block_table)
    fp8 = current_platform.fp8_dtype()
    return PagedCache(key.view(fp8), value.view(fp8), block_table, attn._k_scale, attn._v_scale)


def window_of(impl: Any) -> int:
    """Keys that a query sees, its own included; 0: all.

    Args:
        impl: its `sliding_window` is how many on the left of its own, and on the right; -1: all.
    """
    return int(impl.sliding_window[0]) + 1
