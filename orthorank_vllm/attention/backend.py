"""Attention of a sparse set of queries over vLLM's paged KV cache, and the choice among its ways.

Where to find what: `cpu` (vLLM's CPU kernel, given runs of queries, and `sdpa` beside it),
`stock` (vLLM's own attention of all queries, of which the selected ones are kept), `paged` (a
kernel of our own, `paged_kernel`). All are exact; they differ in speed and in what they can serve.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from orthorank_vllm.options import ATTENTION
from orthorank_vllm.selection.plan import Batch, Ints

# Keys of a batch's longest request from which our kernel is taken where both can serve. NOT
# MEASURED, on any GPU: FlashAttention does three times the work faster, so short prompts are
# left to it; from here on attention is a large part of a layer. `benchmarks/steps.py` measures.
TRITON_FROM_CONTEXT = 4096

# What may be asked for, by device; `auto` anywhere.
BACKENDS_OF_DEVICE = {"cpu": ("cpu", "gather"), "cuda": ("gather", "triton")}


class AttentionPlan(Protocol):
    """Attention of one forward; layers that compute as many rows share what is prepared in it."""

    def run(
        self,
        attn: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Write K and V of all tokens, as the stock layer does, then attend.

        Args:
            attn: vLLM's `Attention` layer.
            query: [selected, heads x head size], rotated.
            key, value: [tokens, kv heads x head size], the first rotated.
            rows: [selected] int64, the queries' rows in the batch, ascending; None: all of them.
            positions: [selected] absolute position of each query.

        Returns:
            [selected, heads x head size].
        """

    def write(self, attn: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write K and V of all tokens, where nothing attends."""


@dataclass(frozen=True)
class AttentionBackend:
    """How the layers of a sparse forward attend.

    Attributes:
        description: for the start-up line.
        plan: for queries of which each request has so many (the array, [requests]), in batch
            order; None: for every token of the batch.
        compile: has all compiled that steps of a dtype will need, or returns False while there is
            no KV cache; None: nothing is compiled.
    """

    description: str
    plan: Callable[[Batch, Ints | None], AttentionPlan]
    compile: Callable[[torch.dtype], bool] | None = None


def check_backend(asked: str, device: str) -> None:
    """Check that a way of attending is one for this device.

    Raises:
        OptionError: this way of attending is not for this device.
    """
    ways = ("auto", *BACKENDS_OF_DEVICE[device])
    if asked not in ways:
        raise ATTENTION.rejected(asked, f"on this device ({device}) give {', '.join(ways)}")


def choose_backend(asked: str, attention_layers: Sequence[Any], device: str) -> AttentionBackend:
    """Choose how the layers attend: as asked, or what serves best here.

    Args:
        asked: one of `options.ATTENTION_BACKENDS`.
        attention_layers: vLLM's `Attention` layers of the model.

    Raises:
        OptionError: the way asked for cannot serve this model here.
    """
    check_backend(asked, device)
    if device == "cpu" and asked != "gather":
        from orthorank_vllm.attention.cpu import CpuAttention

        return AttentionBackend("cpu", CpuAttention)

    from orthorank_vllm.attention.stock import GatherAttention, StockAttention

    def gather(batch: Batch, rows_per_request: Ints | None) -> AttentionPlan:
        return StockAttention() if rows_per_request is None else GatherAttention()

    if asked == "gather":
        return AttentionBackend("gather", gather)

    from orthorank_vllm.attention.paged import TritonAttention, compile_for, obstacle

    reasons = (reason for attn in attention_layers if (reason := obstacle(attn)))
    reason = next(reasons, None)
    if reason is not None and asked == "triton":
        raise ATTENTION.rejected(asked, f"it cannot serve {reason}; give auto or gather")
    if reason is not None:
        return AttentionBackend(f"gather (triton cannot serve {reason})", gather)

    def triton(batch: Batch, rows_per_request: Ints | None) -> AttentionPlan:
        if rows_per_request is None:
            return StockAttention()
        is_short = (batch.num_computed + batch.query_len).max() < TRITON_FROM_CONTEXT
        if asked == "auto" and is_short:
            return GatherAttention()
        return TritonAttention(batch, rows_per_request)

    description = "triton"
    if asked == "auto":
        description = f"triton from {TRITON_FROM_CONTEXT} tokens of context, gather below"
    return AttentionBackend(description, triton, partial(compile_for, attention_layers))
