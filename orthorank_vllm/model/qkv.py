"""Q, K and V of a selective layer: K and V for every token, Q only for the selected ones.

vLLM keeps one fused weight, `[q | k | v]` by rows (vllm/model_executor/layers/linear.py,
QKVParallelLinear). Where it is not quantised it is cut in two: on a GPU as two views of it; on CPU,
where vLLM packs it while loading, as two more packed weights, made before that. Otherwise Q is
computed for all tokens and gathered.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import linear
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from orthorank_vllm.model.adapters import RowAdapters, base_of, product

Linear = Callable[[torch.Tensor], torch.Tensor]
# Of rows, [selected] int64 or None for all, and their adapters, to their Q, [selected, heads x head
# size].
QueryOf = Callable[[torch.Tensor | None, RowAdapters | None], torch.Tensor]


class FusedWeight:
    """One layer's fused weight as it was loaded, kept until it is known whether to cut it.

    Attributes:
        query_rows: of the weight's first dimension; K and V follow.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, query_rows: int) -> None:
        self.weight = weight
        self.bias = bias
        self.query_rows = query_rows

    @classmethod
    def of(cls, attn: Any) -> "FusedWeight | None":
        """A layer's `attn.qkv_proj`, not yet packed; None if it has to stay whole."""
        fused = attn.qkv_proj
        weight = getattr(fused, "weight", None)
        if (
            type(fused.quant_method) is not UnquantizedLinearMethod
            or weight is None
            or weight.device.type != "cpu"
            or weight.ndim != 2
        ):
            return None
        bias = None if fused.bias is None else fused.bias.detach()
        return cls(weight.detach(), bias, attn.q_size)


def tell_before_packing(attn: Any, tell: Callable[[FusedWeight], None]) -> None:
    """Have a layer's fused weight told whenever vLLM is about to pack it: at each load.

    Args:
        attn: with `qkv_proj`, whose method of loading is its own.
    """
    method = attn.qkv_proj.quant_method
    if type(method) is not UnquantizedLinearMethod:
        return
    pack = method.process_weights_after_loading

    def tell_and_pack(module: nn.Module) -> None:
        fused = FusedWeight.of(attn)
        if fused is not None:
            tell(fused)
        pack(module)

    method.process_weights_after_loading = tell_and_pack


class SplitWeight(Protocol):
    """The fused weight of one layer, cut between Q and K."""

    def query(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, heads x head size] of [rows, hidden]."""

    def key_value(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, 2 x kv heads x head size] of [rows, hidden]."""


class SlicedWeight:
    """A cut by views: the weight stays where it is, and may be loaded anew."""

    def __init__(self, attn: Any) -> None:
        self._fused = base_of(attn.qkv_proj)
        self._query_rows = attn.q_size

    @classmethod
    def of(cls, attn: Any) -> "SlicedWeight | None":
        """The cut of `attn.qkv_proj`; None if it has to stay whole, or is not on a GPU."""
        fused = base_of(attn.qkv_proj)
        weight = getattr(fused, "weight", None)
        is_plain = type(fused.quant_method) is UnquantizedLinearMethod
        if not is_plain or weight is None or weight.device.type != "cuda" or weight.ndim != 2:
            return None
        return cls(attn)

    def query(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, heads x head size] of [rows, hidden], by the first rows of the weight."""
        return self._linear(rows, slice(None, self._query_rows))

    def key_value(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, 2 x kv heads x head size] of [rows, hidden], by the others."""
        return self._linear(rows, slice(self._query_rows, None))

    def _linear(self, rows: torch.Tensor, part: slice) -> torch.Tensor:
        bias = self._fused.bias
        return linear(rows, self._fused.weight[part], None if bias is None else bias[part])


class PackedWeight:
    """A cut by two more weights, packed for vLLM's CPU kernel."""

    def __init__(self, fused: FusedWeight) -> None:
        self.query = _packed(fused, slice(None, fused.query_rows))
        self.key_value = _packed(fused, slice(fused.query_rows, None))


def project(
    attn: Any,
    split: SplitWeight | None,
    normed: torch.Tensor,
    adapters: RowAdapters | None = None,
) -> tuple[torch.Tensor, torch.Tensor, QueryOf]:
    """K and V of all tokens, not rotated, and what gives Q of some.

    Args:
        attn: vLLM's `LlamaAttention` or one with the same parts.
        normed: [tokens, hidden].
        adapters: of all tokens.

    Returns:
        K and V, [tokens, kv heads x head size], and Q by rows.
    """

    def gathered(states: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        return states if rows is None else states.index_select(0, rows)

    def split_query(rows: torch.Tensor | None, of_rows: RowAdapters | None) -> torch.Tensor:
        assert split is not None
        chosen = gathered(normed, rows)
        query = split.query(chosen)
        if of_rows is not None:
            of_rows.add_to(query, attn.qkv_proj, chosen)
        return query

    if split is not None:
        key_value = split.key_value(normed)
        if adapters is not None:
            adapters.add_to(key_value, attn.qkv_proj, normed, start=attn.q_size)
        key, value = key_value.split([attn.kv_size, attn.kv_size], dim=-1)
        return key, value, split_query
    fused = product(attn.qkv_proj, normed, adapters)
    query, key, value = fused.split([attn.q_size, attn.kv_size, attn.kv_size], dim=-1)
    return key, value, lambda rows, _: gathered(query, rows)


def _packed(fused: FusedWeight, rows: slice) -> Linear:
    part: Any = nn.Module()
    # A view of whole rows: packing copies it, a copy before that would only fragment the heap.
    part.weight = nn.Parameter(fused.weight[rows], requires_grad=False)
    bias = None if fused.bias is None else fused.bias[rows]
    dispatch_cpu_unquantized_gemm(part, remove_weight=True)

    def packed_linear(rows_in: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = part.cpu_linear(rows_in, part.weight, bias)
        return result

    return packed_linear
