"""vLLM's own fast kernels, called outside its compiled graph.

With compilation on, vLLM's modules run their plain torch form when they are
called eagerly, because the compiler would fuse it (vllm/config/vllm.py,
`ir_op_priority` and `custom_ops`): on CPU a norm is then 50 times slower.
"""

from typing import Any

import torch
from torch.nn.functional import silu
from vllm import _custom_ops as ops
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from orthorank_vllm.model.adapters import RowAdapters, base_of, has_adapters, product

# `silu(gate) * up` and nothing else (vllm/model_executor/models/{llama,mistral,qwen2,granite}.py).
# By name: to compare with the classes, all of those modules would have to be imported.
SILU_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "GraniteMLP")


def add_and_norm(
    norm: Any, residual: torch.Tensor, update: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm(residual + update)` and the sum. Both arguments are given away: they may be reused.

    Args:
        residual: [tokens, hidden] residual stream.
        update: [tokens, hidden] still to be added to it, or None.
    """
    if not _is_plain(norm, residual):
        return (norm(residual), residual) if update is None else norm(update, residual)
    if update is None:
        normed = torch.empty_like(residual)
        ops.rms_norm(normed, residual, norm.weight, norm.variance_epsilon)
        return normed, residual
    ops.fused_add_rms_norm(update, residual, norm.weight, norm.variance_epsilon)
    return update, residual


def norm_heads(norm: Any, heads: torch.Tensor, head_size: int) -> torch.Tensor:
    """`norm` of each head.

    Args:
        heads: [tokens, heads x head size].
    """
    normed, _ = add_and_norm(norm, heads.reshape(-1, head_size), None)
    return normed.view(heads.shape)


def rotate(
    rotary: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None
) -> tuple[torch.Tensor, Any]:
    """Rotary embedding, in place where the platform has a kernel.

    Args:
        positions: [tokens].
        query, key: [tokens, heads x head size]; either kind may stand first, alone.
    """
    kernel = rotary
    if hasattr(rotary, "forward_cpu"):
        kernel = rotary.forward_cpu if query.device.type == "cpu" else rotary.forward_cuda
    elif key is None:
        # Phi-3's long one is no custom operator, and insists on a key.
        key = query[:, : rotary.head_size]
    rotated: tuple[torch.Tensor, Any] = kernel(positions, query, key)
    return rotated


def mlp(module: Any, normed: torch.Tensor, adapters: RowAdapters | None = None) -> torch.Tensor:
    """The layer's MLP, or whatever stands in its place.

    On CPU its activation is a compiled function of its own, and entering that costs more than the
    activation itself.

    Args:
        normed: [tokens, hidden].
        adapters: of these tokens.
    """
    if not (type(module).__name__ in SILU_MLPS and _is_by_parts(module, normed)):
        output: torch.Tensor = module(normed)
        return output
    gate, up = product(module.gate_up_proj, normed, adapters).chunk(2, dim=-1)
    return product(module.down_proj, silu(gate).mul_(up), adapters)


def _is_by_parts(module: Any, normed: torch.Tensor) -> bool:
    if has_adapters(module.gate_up_proj) or has_adapters(module.down_proj):
        return True
    method = base_of(module.down_proj).quant_method
    return normed.device.type == "cpu" and isinstance(method, UnquantizedLinearMethod)


def _is_plain(norm: Any, residual: torch.Tensor) -> bool:
    return (
        type(norm) is RMSNorm
        and norm.has_weight
        and norm.variance_size_override is None
        and norm.weight.dtype == residual.dtype
        and residual.is_contiguous()
    )
