"""Attention by torch's own kernel, for requests whose whole context is in the batch.

Where the CPU has no AVX-512, vLLM's kernel takes up to twice as long (docs/performance.md). Such a
request's K and V are rows of the batch, so no page is read. Selected queries are attended to in
blocks, each with the keys that its last query sees.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from orthorank_vllm.selection.plan import Batch, Ints

BLOCK_ROWS = 64
# Below these vLLM's kernel is as fast.
MIN_TOKENS = 128
MIN_TOKENS_SELECTED = 512


def is_faster_here() -> bool:
    """Measured with AVX2 and with AVX-512; elsewhere vLLM's own kernel is taken."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def is_plain(attn: Any) -> bool:
    """Whether queries see all keys before them, and nothing else.

    Args:
        attn: vLLM's `Attention` layer.
    """
    impl = attn.impl
    return (
        impl.sliding_window == -1
        and impl.alibi_slopes is None
        and impl.sinks is None
        and not impl.logits_soft_cap
    )


@dataclass(frozen=True)
class WholeRequest:
    """One request whose context this forward computes from its first token.

    Attributes:
        tokens: its rows in the batch.
        queries: its rows among the queries.
    """

    tokens: slice
    queries: slice

    @property
    def is_dense(self) -> bool:
        return self.queries.stop - self.queries.start == self.tokens.stop - self.tokens.start

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        scale: float,
        output: torch.Tensor,
    ) -> None:
        """Write the output of this request's queries.

        Args:
            query, output: [selected, heads, head size] of the batch.
            key, value: [tokens, kv heads, head size] of the batch.
            positions: [selected] int64, on the host.
        """
        key, value = (rows[self.tokens].transpose(0, 1)[None] for rows in (key, value))
        if self.is_dense:
            output[self.queries] = _attention(
                query[self.queries], key, value, scale, is_causal=True
            )
            return
        for start in range(self.queries.start, self.queries.stop, BLOCK_ROWS):
            rows = slice(start, min(start + BLOCK_ROWS, self.queries.stop))
            visible = int(positions[rows.stop - 1]) + 1
            output[rows] = _attention(
                query[rows],
                key[:, :, :visible],
                value[:, :, :visible],
                scale,
                attn_mask=torch.arange(visible) <= positions[rows, None],
            )


def whole_requests(batch: Batch, rows_per_request: Ints) -> list[WholeRequest]:
    """The requests of a batch that torch's kernel is worth it for.

    Args:
        rows_per_request: [requests] how many queries each has.
    """
    last, last_query = np.cumsum(batch.query_len), np.cumsum(rows_per_request)
    is_dense = rows_per_request == batch.query_len
    least = np.where(is_dense, MIN_TOKENS, MIN_TOKENS_SELECTED)
    found = (batch.num_computed == 0) & (batch.query_len >= least) & (rows_per_request > 0)
    return [
        WholeRequest(
            slice(int(last[r] - batch.query_len[r]), int(last[r])),
            slice(int(last_query[r] - rows_per_request[r]), int(last_query[r])),
        )
        for r in np.flatnonzero(found)
    ]


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, **mask: Any
) -> torch.Tensor:
    """[queries, heads, head size] of [queries, heads, head size] and two [1, kv heads, keys, …]."""
    attended = scaled_dot_product_attention(
        query.transpose(0, 1)[None], key, value, scale=scale, enable_gqa=True, **mask
    )
    return attended[0].transpose(0, 1)
