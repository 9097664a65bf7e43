"""Sparse-query attention for vLLM's CPU backend.

vLLM's kernel takes a sequence's queries to be its last tokens. So each run of
neighbouring selected positions is given to it as a sequence of its own: the
same pages, ending with the run's last position. That is exact, for prompts,
chunks, cached prefixes and decode rows alike (vllm/v1/attention/backends/cpu_attn.py).
"""

from typing import Any

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.model_executor.layers.attention.attention import (
    get_attention_context,
    unified_attention_with_output,
    unified_kv_cache_update,
)

from orthorank_vllm.plan import Ints


class CpuSparseAttention:
    """Attention of one forward; layers that compute as many rows share what is prepared here."""

    def __init__(self, rows_per_request: Ints) -> None:
        """
        Args:
            rows_per_request: [requests] how many queries each has, in batch order.
        """
        self._request = np.repeat(np.arange(len(rows_per_request)), rows_per_request)
        # Neighbouring rows of two requests can have neighbouring positions too.
        self._request_ends = np.diff(self._request) != 0

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

    @staticmethod
    def of_all(
        attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Dense attention, K and V written first: what `attn` itself does, without the
        dispatcher between, which costs as much as a small batch's arithmetic.

        Args:
            attn: vLLM's `Attention` layer.
            query, key, value: [tokens, heads x head size], rotated.

        Returns:
            [tokens, heads x head size].
        """
        CpuSparseAttention.write_kv(attn, key, value)
        query = query.view(-1, attn.num_heads, attn.head_size)
        output = torch.empty(query.shape, dtype=query.dtype)
        unified_attention_with_output(query, key, value, output, attn.layer_name)
        return output.flatten(1)

    def __call__(self, attn: Any, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """
        Args:
            attn: vLLM's `Attention` layer, K and V of this forward written.
            query: [selected, heads x head size], rotated.
            positions: [selected] absolute position of each query.

        Returns:
            [selected, heads x head size].
        """
        metadata, _, kv_cache, _ = get_attention_context(attn.layer_name)
        impl = attn.impl
        query = query.view(-1, attn.num_heads, attn.head_size)
        output = torch.empty_like(query)
        starts, requests, lengths = self._runs(positions)
        key_cache, value_cache = kv_cache.view(
            kv_cache.shape[0], kv_cache.shape[1], 2 * kv_cache.shape[2], -1
        ).chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=starts,
            seq_lens=lengths,
            scale=impl.scale,
            causal=True,
            alibi_slopes=impl.alibi_slopes,
            sliding_window=impl.sliding_window,
            block_table=metadata.block_table[requests],
            softcap=impl.logits_soft_cap,
            scheduler_metadata=ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(lengths),
                num_heads=attn.num_heads,
                num_kv_heads=attn.num_kv_heads,
                head_dim=attn.head_size,
                seq_lens=lengths,
                dtype=query.dtype,
                query_start_loc=starts,
                causal=True,
                sliding_window_size=impl.sliding_window,
                isa=attn.isa,
                enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            ),
            s_aux=impl.sinks,
        )
        return output.flatten(1)

    def _runs(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cut the selected rows into runs.

        Returns:
            first row of each run and the end, [runs + 1] int32; request of each
            run, [runs] int64; keys that its last query sees, [runs] int32.
        """
        # In numpy, on the same memory: these are many steps on few numbers.
        found = positions.numpy()
        last = np.flatnonzero(self._request_ends | (np.diff(found) != 1))
        last = np.append(last, len(found) - 1)
        starts = np.zeros(len(last) + 1, dtype=np.int32)
        starts[1:] = last + 1
        lengths = (found[last] + 1).astype(np.int32)
        return (
            torch.from_numpy(starts),
            torch.from_numpy(self._request[last]),
            torch.from_numpy(lengths),
        )
