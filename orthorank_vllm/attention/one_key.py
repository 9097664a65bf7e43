"""Attention of tokens that see themselves alone, as position 0 does; no KV cache."""

from typing import Any

import torch

from orthorank_vllm.attention.kv_cache import read_back


class OneKeyAttention:
    """An `AttentionPlan`: attention over a single key returns its value, as the pages hold it."""

    def run(
        self,
        attn: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """[tokens, heads x head size]: see `AttentionPlan.run`."""
        assert rows is None
        per_head = read_back(attn, value).unflatten(-1, (attn.num_kv_heads, attn.head_size))
        group = attn.num_heads // attn.num_kv_heads
        return per_head.repeat_interleave(group, dim=1).flatten(1)

    def write(self, attn: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write nothing: no later token sees these."""
