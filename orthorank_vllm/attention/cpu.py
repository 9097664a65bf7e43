"""Attention of any set of queries, for vLLM's CPU backend.

vLLM's kernel takes a sequence's queries to be its last tokens. So each run of
neighbouring selected positions is given to it as a sequence of its own: the
same pages, ending with the run's last position. That is exact, for prompts,
chunks, cached prefixes and decode rows alike (vllm/v1/attention/backends/cpu_attn.py).
Where torch's kernel is faster, requests that begin in this forward take that (`sdpa`).
"""

from typing import Any

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.model_executor.layers.attention.attention import (
    get_attention_context,
    unified_attention_with_output,
)

from orthorank_vllm.attention import sdpa
from orthorank_vllm.attention.kv_cache import between_transfers, is_quantised, write_alone, write_kv
from orthorank_vllm.compat import cpu_isa
from orthorank_vllm.selection.plan import Batch, Ints

# Decided once: it depends on the machine alone.
IN_BLOCKS = sdpa.is_faster_here()


class CpuAttention:
    """Attention by vLLM's CPU kernel, and by torch's for whole requests."""

    def __init__(self, batch: Batch, rows_per_request: Ints | None) -> None:
        """Sort a forward's queries by the kernel that attends for them.

        Args:
            rows_per_request: [requests] how many queries each has, in batch order; None: all.
        """
        if rows_per_request is None:
            rows_per_request = batch.query_len
        request = np.repeat(np.arange(len(rows_per_request)), rows_per_request)
        self._all = _Runs(request)
        self._whole = sdpa.whole_requests(batch, rows_per_request) if IN_BLOCKS else []
        if self._whole:
            is_left = np.ones(len(request), dtype=bool)
            for whole in self._whole:
                is_left[whole.queries] = False
            self._left_rows = torch.from_numpy(np.flatnonzero(is_left))
            self._left = _Runs(request[is_left])
        self._is_dense = bool((rows_per_request == batch.query_len).all())

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
        """Write K and V, then attend: whole requests by torch, the others run by run."""
        write_kv(attn, key, value)
        query = query.view(-1, attn.num_heads, attn.head_size)
        output = torch.empty_like(query)
        if not self._whole or not sdpa.is_plain(attn) or is_quantised(attn):
            if self._is_dense:
                # What `attn` itself calls, without the dispatcher between, which costs as
                # much as a small batch's arithmetic.
                unified_attention_with_output(query, key, value, output, attn.layer_name)
            else:
                between_transfers(
                    lambda: self._all.attend(attn, query, positions, output), attn.layer_name
                )
            return output.flatten(1)
        between_transfers(
            lambda: self._attend_whole(attn, query, key, value, positions, output), attn.layer_name
        )
        return output.flatten(1)

    def _attend_whole(
        self,
        attn: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        key = key.view(-1, attn.num_kv_heads, attn.head_size)
        value = value.view(-1, attn.num_kv_heads, attn.head_size)
        for whole in self._whole:
            whole.attend(query, key, value, positions, attn.impl.scale, output)
        if len(self._left_rows):
            rest = query[self._left_rows]
            rest_output = torch.empty_like(rest)
            self._left.attend(attn, rest, positions[self._left_rows], rest_output)
            output[self._left_rows] = rest_output


class _Runs:
    """Queries as runs of neighbouring positions, each a sequence for vLLM's kernel."""

    def __init__(self, request: Ints) -> None:
        """Keep where one request's queries end and the next one's begin.

        Args:
            request: [queries] the batch index of each one's request, ascending.
        """
        self._request = request
        # Neighbouring rows of two requests can have neighbouring positions too.
        self._request_ends = np.diff(request) != 0

    def attend(
        self, attn: Any, query: torch.Tensor, positions: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Write `output`, [queries, heads, head size]."""
        metadata, _, kv_cache, _ = get_attention_context(attn.layer_name)
        impl = attn.impl
        starts, requests, lengths = self._cut(positions)
        key_cache, value_cache = kv_cache.view(
            kv_cache.shape[0], kv_cache.shape[1], 2 * kv_cache.shape[2], -1
        ).chunk(2, dim=2)
        # Only where it is needed: 0.26 has no such argument.
        dtype = {"kv_cache_dtype": impl.kv_cache_dtype} if is_quantised(attn) else {}
        scales = {"k_scale": attn._k_scale_float, "v_scale": attn._v_scale_float} if dtype else {}
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
                isa=cpu_isa(attn),
                enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
                **dtype,
            ),
            s_aux=impl.sinks,
            **dtype,
            **scales,
        )

    def _cut(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cut the queries into runs.

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
