"""K and V on their way into vLLM's pages."""

from typing import Any

import torch
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update


def write_kv(attn: Any, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write every token's K and V, as the stock layer does: in its layout, and quantised if it is.

    Args:
        attn: vLLM's `Attention` layer.
        key, value: [tokens, kv heads x head size].
    """
    unified_kv_cache_update(
        key.view(-1, attn.num_kv_heads, attn.head_size),
        value.view(-1, attn.num_kv_heads, attn.head_size),
        attn.layer_name,
    )
