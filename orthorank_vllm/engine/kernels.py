"""vLLM's own fast kernels, called outside its compiled graph.

With compilation on, vLLM's modules run their plain torch form when they are
called eagerly, because the compiler would fuse it (vllm/config/vllm.py,
`ir_op_priority` and `custom_ops`): on CPU a norm is then 50 times slower.
"""

from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.layernorm import RMSNorm


def add_and_norm(
    norm: Any, stream: torch.Tensor, delta: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm(stream + delta)` and the sum. Both arguments are given away: they may be reused.

    Args:
        stream: [tokens, hidden] residual stream.
        delta: [tokens, hidden] still to be added to it, or None.
    """
    if not _is_plain(norm, stream):
        return (norm(stream), stream) if delta is None else norm(delta, stream)
    if delta is None:
        normed = torch.empty_like(stream)
        ops.rms_norm(normed, stream, norm.weight, norm.variance_epsilon)
        return normed, stream
    ops.fused_add_rms_norm(delta, stream, norm.weight, norm.variance_epsilon)
    return delta, stream


def rotate(rotary: Any, positions: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of queries or keys, in place where the platform has a kernel.

    Args:
        positions: [tokens].
        heads: [tokens, heads x head size].
    """
    kernel = rotary.forward_cpu if heads.device.type == "cpu" else rotary.forward_cuda
    rotated: torch.Tensor = kernel(positions, heads, None)[0]
    return rotated


def _is_plain(norm: Any, stream: torch.Tensor) -> bool:
    return (
        type(norm) is RMSNorm
        and norm.has_weight
        and norm.variance_size_override is None
        and norm.weight.dtype == stream.dtype
        and stream.is_contiguous()
    )
