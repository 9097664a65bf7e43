"""Sparse-query attention for vLLM's CPU backend.

vLLM's kernel takes each request's queries to be contiguous and its last tokens.
So the requests without candidates (decode, tiny chunks) keep that kernel, and
the selected queries of the others go through torch's own attention in blocks,
over the keys up to each block's last query.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from vllm import _custom_ops as ops
from vllm import envs
from vllm.model_executor.layers.attention.attention import (
    get_attention_context,
    unified_kv_cache_update,
)

from orthorank_vllm.attention.cpu_pages import PageReader
from orthorank_vllm.plan import Plan

# Queries per call: few enough that the mask stays in cache and that the keys
# beyond a block's early queries cost little, enough to fill the kernel.
QUERY_BLOCK = 128


@dataclass(frozen=True)
class _Span:
    """One request with candidates: where its rows are."""

    index: int
    first_row: int
    query_len: int
    num_computed: int
    selected: slice


class CpuSparseAttention:
    """Attention of one forward; all its selective layers share what is prepared here."""

    def __init__(self, plan: Plan) -> None:
        batch = plan.batch
        first_row = np.cumsum(batch.query_len) - batch.query_len
        last = np.cumsum(plan.selected_per_request)
        first = last - plan.selected_per_request
        self._spans = [
            _Span(
                index=r,
                first_row=int(first_row[r]),
                query_len=int(batch.query_len[r]),
                num_computed=int(batch.num_computed[r]),
                selected=slice(int(first[r]), int(last[r])),
            )
            for r in plan.requests.tolist()
        ]
        dense = np.setdiff1d(np.flatnonzero(batch.query_len), plan.requests)
        self._dense_requests = torch.from_numpy(dense)
        self._dense_selected = torch.from_numpy(
            np.flatnonzero(
                np.isin(np.repeat(np.arange(len(first)), plan.selected_per_request), dense)
            )
        )
        self._dense_start = torch.from_numpy(
            np.concatenate([[0], np.cumsum(batch.query_len[dense])]).astype(np.int32)
        )
        # A model's layers may differ in their metadata (sliding windows).
        self._dense_schedule: dict[tuple[int, int], dict[str, Any]] = {}

    @staticmethod
    def write_kv(attn: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write every token's K and V, as the stock layer does.

        Args:
            attn: vLLM's `Attention` layer.
            key, value: [tokens, kv heads x head size].
        """
        unified_kv_cache_update(
            key.view(-1, attn.num_kv_heads, attn.head_size),
            value.view(-1, attn.num_kv_heads, attn.head_size),
            attn.layer_name,
        )

    def __call__(
        self,
        attn: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            attn: vLLM's `Attention` layer, K and V written.
            query: [selected, heads x head size], rotated.
            key, value: [tokens, kv heads x head size] of this forward.
            positions: [selected] absolute position of each query.

        Returns:
            [selected, heads x head size].
        """
        metadata, _, kv_cache, _ = get_attention_context(attn.layer_name)
        query = query.view(-1, attn.num_heads, attn.head_size)
        key = key.view(-1, attn.num_kv_heads, attn.head_size)
        value = value.view(-1, attn.num_kv_heads, attn.head_size)
        output = torch.empty_like(query)
        if len(self._dense_requests):
            output[self._dense_selected] = self._attend_dense(attn, metadata, kv_cache, query)
        for span in self._spans:
            if span.num_computed == 0:
                rows = slice(span.first_row, span.first_row + span.query_len)
                keys, values = key[rows].transpose(0, 1), value[rows].transpose(0, 1)
            else:
                pages = PageReader.of(attn.isa, kv_cache)
                length = span.num_computed + span.query_len
                keys, values = pages.read(kv_cache, metadata.block_table[span.index], length)
            _attend_blocks(
                query[span.selected],
                keys,
                values,
                positions[span.selected],
                attn.impl.scale,
                attn.impl.sliding_window,
                output[span.selected],
            )
        return output.flatten(1)

    def _attend_dense(
        self, attn: Any, metadata: Any, kv_cache: torch.Tensor, query: torch.Tensor
    ) -> torch.Tensor:
        impl = attn.impl
        known = self._dense_schedule.get((id(metadata), impl.sliding_window))
        if known is None:
            seq_lens = metadata.seq_lens[self._dense_requests]
            known = self._dense_schedule[id(metadata), impl.sliding_window] = {
                "query_start_loc": self._dense_start,
                "seq_lens": seq_lens,
                "block_table": metadata.block_table[self._dense_requests],
                "scheduler_metadata": ops.cpu_attn_get_scheduler_metadata(
                    num_reqs=len(seq_lens),
                    num_heads=attn.num_heads,
                    num_kv_heads=attn.num_kv_heads,
                    head_dim=attn.head_size,
                    seq_lens=seq_lens,
                    dtype=query.dtype,
                    query_start_loc=self._dense_start,
                    causal=True,
                    sliding_window_size=impl.sliding_window,
                    isa=attn.isa,
                    enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
                ),
            }
        query = query[self._dense_selected]
        output = torch.empty_like(query)
        key_cache, value_cache = kv_cache.view(
            kv_cache.shape[0], kv_cache.shape[1], 2 * kv_cache.shape[2], -1
        ).chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            scale=impl.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=impl.sliding_window,
            softcap=0,
            s_aux=None,
            **known,
        )
        return output


def _attend_blocks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    sliding_window: int,
    output: torch.Tensor,
) -> None:
    """Causal attention by absolute position.

    Args:
        query: [selected, heads, head size], positions ascending.
        keys, values: [kv heads, length, head size], the request's from position 0.
        positions: [selected].
        sliding_window: keys that a query sees, itself included; -1 for all.
        output: [selected, heads, head size], written.
    """
    num_selected, num_heads, head_size = query.shape
    num_kv_heads = keys.shape[0]
    # Query groups as the heads of a batch of KV heads: no K or V is repeated.
    grouped = query.view(num_selected, num_kv_heads, -1, head_size).permute(1, 2, 0, 3)
    group_size = num_heads // num_kv_heads
    bounds = positions.tolist()
    for start in range(0, num_selected, QUERY_BLOCK):
        block = slice(start, min(start + QUERY_BLOCK, num_selected))
        high = bounds[block.stop - 1] + 1
        low = 0 if sliding_window < 0 else max(0, bounds[start] - sliding_window + 1)
        key_position = torch.arange(low, high)
        distance = positions[block, None] - key_position
        hidden = distance < 0
        if sliding_window >= 0:
            hidden |= distance >= sliding_window
        mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, -torch.inf)
        shape = (num_kv_heads, group_size, high - low, head_size)
        attended = scaled_dot_product_attention(
            grouped[:, :, block],
            keys[:, None, low:high].expand(shape),
            values[:, None, low:high].expand(shape),
            attn_mask=mask[None, None],
            scale=scale,
        )
        output[block] = attended.permute(2, 0, 1, 3).flatten(1, 2)
