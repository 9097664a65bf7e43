"""Attention of a sparse set of queries over vLLM's paged KV cache, and the choice among its ways.

Where to find what: `cpu` (vLLM's CPU kernel, given runs of queries, and `sdpa` beside it),
`stock` (vLLM's own attention of all queries, of which the selected ones are kept), `paged` (a
kernel of our own, `paged_kernel`). All are exact; they differ in speed and in what they can serve.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from orthorank_vllm.options import rejected
from orthorank_vllm.selection.plan import Batch, Ints

# Keys of a batch's longest request from which our kernel is taken where both can serve. NOT
# MEASURED, on any GPU: FlashAttention does three times the work faster, so short prompts are
# left to it; from here on attention is a large part of a layer. `orthorank device-check` measures.
TRITON_FROM_CONTEXT = 4096

# What may be asked for, by device; `auto` anywhere.
WAYS_OF_DEVICE = {"cpu": ("cpu", "gather"), "cuda": ("gather", "triton")}


class QueryAttention(Protocol):
    """Attention of one forward; layers that compute as many rows share what is prepared in it."""

    def __call__(
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


@dataclass(frozen=True)
class AttentionWay:
    """How the selective and the dense layers of a sparse forward attend.

    Attributes:
        description: for the start-up line.
        of_some: for queries of which each request has so many (the array, [requests]).
        of_all: for every token of a batch.
    """

    description: str
    of_some: Callable[[Batch, Ints], QueryAttention]
    of_all: Callable[[Batch], QueryAttention]


def check_way(asked: str, device: str) -> None:
    """
    Raises:
        OptionError: this way of attending is not for this device.
    """
    ways = ("auto", *WAYS_OF_DEVICE[device])
    if asked not in ways:
        raise rejected("attention", asked, f"on this device ({device}) give {', '.join(ways)}")


def choose_way(asked: str, attention_layers: Sequence[Any], device: str) -> AttentionWay:
    """
    Args:
        asked: one of `options.ATTENTION_WAYS`.
        attention_layers: vLLM's `Attention` layers of the model.

    Raises:
        OptionError: the way asked for cannot serve this model here.
    """
    check_way(asked, device)
    if device == "cpu" and asked != "gather":
        from orthorank_vllm.attention.cpu import CpuAttention

        return AttentionWay("cpu", CpuAttention, lambda batch: CpuAttention(batch, batch.query_len))

    from orthorank_vllm.attention.stock import GatherAttention, StockAttention

    gather = AttentionWay("gather", lambda batch, _: GatherAttention(), lambda _: StockAttention())
    if asked == "gather":
        return gather

    from orthorank_vllm.attention.paged import TritonAttention, obstacle

    reasons = (reason for attn in attention_layers if (reason := obstacle(attn)))
    reason = next(reasons, None)
    if reason is not None and asked == "triton":
        raise rejected("attention", asked, f"it cannot serve {reason}; give auto or gather")
    if reason is not None:
        return AttentionWay(f"gather (triton cannot serve {reason})", gather.of_some, gather.of_all)
    if asked == "triton":
        return AttentionWay("triton", TritonAttention, gather.of_all)

    def by_length(batch: Batch, rows_per_request: Ints) -> QueryAttention:
        is_short = (batch.num_computed + batch.query_len).max() < TRITON_FROM_CONTEXT
        # The first forward compiles the kernel, whatever its length: in Model Runner V2 that is
        # one of vLLM's own at start-up, and no user waits for it.
        if is_short and TritonAttention.has_run:
            return gather.of_some(batch, rows_per_request)
        return TritonAttention(batch, rows_per_request)

    description = f"triton from {TRITON_FROM_CONTEXT} tokens of context, gather below"
    return AttentionWay(description, by_length, gather.of_all)
