"""K and V on their way into vLLM's pages, and what they are when they come back."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from vllm.model_executor.layers.attention.attention import (
    maybe_transfer_kv_layer,
    unified_kv_cache_update,
)
from vllm.platforms import current_platform

_Attended = TypeVar("_Attended")


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


@maybe_transfer_kv_layer
def between_transfers(attend: Callable[[], _Attended], layer_name: str) -> _Attended:
    """Attend after a KV connector has loaded a layer and before it saves it, as vLLM's own does.

    Args:
        attend: not by vLLM's own attention, which would call the connector once more.
        layer_name: of vLLM's `Attention` layer.
    """
    return attend()


def write_alone(attn: Any, key: torch.Tensor, value: torch.Tensor) -> None:
    """`write_kv` where nothing attends: a KV connector saves what is written all the same."""
    write_kv(attn, key, value)
    between_transfers(lambda: None, attn.layer_name)


def is_quantised(attn: Any) -> bool:
    """Whether its pages hold less than what is computed.

    Args:
        attn: vLLM's `Attention` layer.
    """
    return _stored_dtype(attn) is not None


def read_back(attn: Any, value: torch.Tensor) -> torch.Tensor:
    """V as attention finds it in the pages.

    Args:
        attn: vLLM's `Attention` layer.
        value: of any shape.
    """
    stored = _stored_dtype(attn)
    if stored is None:
        return value
    limit = torch.finfo(stored).max
    scaled = (value / attn._v_scale).clamp(-limit, limit)
    rounded = scaled.to(stored)
    if value.is_cpu:
        # vLLM's CPU kernel rounds towards zero; less by one is the next number in that direction.
        is_too_large = rounded.to(scaled.dtype).abs() > scaled.abs()
        rounded = (rounded.view(torch.uint8) - is_too_large.to(torch.uint8)).view(stored)
    return rounded.to(value.dtype) * attn._v_scale


def _stored_dtype(attn: Any) -> torch.dtype | None:
    if not attn.kv_cache_dtype.startswith("fp8"):
        return None
    if attn.kv_cache_dtype == "fp8_e5m2":
        return torch.float8_e5m2
    dtype: torch.dtype = current_platform.fp8_dtype()
    return dtype
