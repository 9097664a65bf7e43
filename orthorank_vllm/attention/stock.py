"""vLLM's own attention, of all tokens: right with every backend and every kind of KV cache.

No backend takes a request's queries to be other than neighbours. So the rows that were not
selected get a query of zeros, and what it attends to is dropped: attention itself is not spared,
only what is computed per row around it.
"""

from typing import Any

import torch

from orthorank_vllm.attention.kv_cache import write_alone


class GatherAttention:
    """Attention of some rows: vLLM's own for all of them, and theirs kept."""

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
        """Attend with every row of the batch, and keep those that were asked for."""
        assert rows is not None
        everyone = query.new_zeros(len(key), query.shape[1])
        everyone.index_copy_(0, rows, query)
        output: torch.Tensor = attn(everyone, key, value)
        return output[rows]


class StockAttention:
    """Attention of every row, by vLLM's own."""

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
        """Attend as the stock layer does."""
        output: torch.Tensor = attn(query, key, value)
        return output
