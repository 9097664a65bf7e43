"""The sparse forward: a walk through vLLM's layers, of which the selective ones compute few rows.

So does the last layer, if it is dense: only rows that are sampled from are read after it.

Works on vLLM's own modules from outside: the compiled model is not entered and
no layer is replaced, so the dense path stays bit-identical to stock vLLM.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from orthorank_vllm.attention.backend import AttentionBackend, AttentionPlan
from orthorank_vllm.attention.one_key import OneKeyAttention
from orthorank_vllm.model.decoder import Decoder, Pick
from orthorank_vllm.model.qkv import SplitWeight
from orthorank_vllm.model.sinks import SinkTable
from orthorank_vllm.model.tensor_parallel import of_first_rank
from orthorank_vllm.selection.plan import Ints, Plan
from orthorank_vllm.selection.topk import SegmentedTopK, to_device


class TopK(Protocol):
    """One of `topk.SegmentedTopK` and `topk_triton.SegmentedTopKTriton`."""

    @staticmethod
    def arrays_of(plan: Plan) -> tuple[Ints, ...]:
        """What is needed of it on the device."""

    @classmethod
    def of_arrays(cls, plan: Plan, arrays: Sequence[torch.Tensor]) -> "TopK":
        """A top-k of these arrays, once they are on the device."""

    def rows(
        self, residual: torch.Tensor, sink_rows: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """Rows to update, ascending; see `SegmentedTopK.rows`."""


@dataclass
class SelectiveLayer:
    """What is kept for one selective layer.

    Attributes:
        sink_row: its index in the sink table.
        split: its QKV weight cut in two, where that can be done.
    """

    sink_row: int
    split: SplitWeight | None = None


@dataclass
class Step:
    """What the selective layers of one forward share.

    Attributes:
        attention, dense_attention: of selected rows, and of all.
        sink_slots: [R] rows of the sink table, one for each request that has candidates.
        fresh_rows, fresh_slots: rows of this batch that are a position 0, and
            the slots that they renew.
        sampled_rows: [N] int64, the rows whose output is read; None: all.
        selected: each selective layer's rows, [plan.num_selected] int64.
        sink_hits, sink_misses: see `Outcome`.
    """

    top_k: TopK
    attention: AttentionPlan
    dense_attention: AttentionPlan
    sink_slots: torch.Tensor
    fresh_rows: torch.Tensor
    fresh_slots: torch.Tensor
    sampled_rows: torch.Tensor | None
    selected: list[torch.Tensor]
    sink_hits: int
    sink_misses: int

    def pick(self, sink_rows: torch.Tensor) -> Pick:
        """The rows that one selective layer computes.

        Args:
            sink_rows: [capacity, hidden], the layer's part of the sink table.
        """

        def top_k(residual: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
            if len(self.fresh_rows):
                fresh = residual.index_select(0, self.fresh_rows)
                sink_rows.index_copy_(0, self.fresh_slots, fresh)
            rows = of_first_rank(self.top_k.rows(residual, sink_rows, self.sink_slots))
            self.selected.append(rows)
            return rows

        return top_k

    @property
    def duplicates(self) -> torch.Tensor:
        """[selective layers] int64, on the device: rows that stand twice in a layer's selection."""
        if not self.selected:
            return torch.zeros(0, dtype=torch.int64)
        rows = torch.stack(self.selected)
        return (rows[:, 1:] == rows[:, :-1]).sum(dim=1)


@dataclass(frozen=True)
class Outcome:
    """What a sparse forward leaves to be counted.

    Attributes:
        skipped: [selective layers] int64, on the device: token updates that each skipped.
        sink_hits, sink_misses: requests whose position 0 this forward lacks, by whether the
            table had its state or it was recomputed.
    """

    skipped: torch.Tensor
    sink_hits: int
    sink_misses: int


def sparse_forward(
    decoder: Decoder,
    selective: dict[int, SelectiveLayer],
    sinks: SinkTable,
    attention: AttentionBackend,
    plan: Plan,
    positions: torch.Tensor,
    residual: torch.Tensor,
    update: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, Outcome]:
    """Prefill through this stage's layers, the selective ones in place.

    Args:
        selective: this stage's, by layer index.
        positions: [tokens].
        residual, update: [tokens, hidden], see `DecoderLayer.forward`.

    Returns:
        the same after the last layer here, right in the rows `plan.sampled_rows`, and what to
        count.
    """
    step = _start_step(decoder, selective, sinks, attention, plan, positions.device)
    sampled_rows = step.sampled_rows
    for index, layer in decoder.layers.items():
        if index in selective:
            kept = selective[index]
            pick = step.pick(sinks.rows[kept.sink_row])
            residual, update = layer.forward(
                step.attention, positions, residual, update, pick, kept.split
            )
        elif index == decoder.last_layer and sampled_rows is not None:
            # Unread rows nobody will miss; their K and V are written.
            of_sampled = attention.plan(plan.batch, plan.sampled_per_request)
            residual, update = layer.forward(
                of_sampled, positions, residual, update, lambda *_: sampled_rows
            )
        else:
            residual, update = layer.forward(step.dense_attention, positions, residual, update)
    skipped = plan.num_tokens - plan.num_selected + step.duplicates
    return residual, update, Outcome(skipped, step.sink_hits, step.sink_misses)


def sink_states(
    decoder: Decoder, selective: dict[int, SelectiveLayer], tokens: torch.Tensor
) -> torch.Tensor:
    """Position 0's residual stream entering each selective layer, for some token ids.

    Only for a decoder that is the whole model.

    Args:
        tokens: [M] int64.

    Returns:
        [selective layers, M, hidden].
    """
    states: list[torch.Tensor] = []

    def note(residual: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        states.append(residual.clone())  # later layers add to it in place
        return tokens[:0]

    attention, positions = OneKeyAttention(), torch.zeros_like(tokens)
    residual = decoder.embed(tokens)
    update: torch.Tensor | None = None
    for index, layer in decoder.layers.items():
        pick = note if index in selective else None
        residual, update = layer.forward(attention, positions, residual, update, pick)
    return torch.stack(states)


def _start_step(
    decoder: Decoder,
    selective: dict[int, SelectiveLayer],
    sinks: SinkTable,
    attention: AttentionBackend,
    plan: Plan,
    device: torch.device,
) -> Step:
    tokens = plan.first_token.tolist()
    slots, missing = sinks.reserve(tokens)
    in_batch = [r for r, row in enumerate(plan.sink_row.tolist()) if row >= 0]
    fresh = {tokens[r] for r in in_batch}
    missing = [token for token in missing if token not in fresh]
    # No request whose position 0 is in the batch has a missing token.
    sink_misses = sum(token in missing for token in tokens)
    slot_of_token = dict(zip(tokens, slots, strict=True))
    kind = _top_k_for(plan, device)
    top_k = kind.arrays_of(plan)
    others = (
        np.array(slots, dtype=np.int64),
        plan.sink_row[in_batch],
        np.array([slots[r] for r in in_batch], dtype=np.int64),
        np.array(missing, dtype=np.int64),
        np.array([slot_of_token[token] for token in missing], dtype=np.int64),
        np.zeros(0, dtype=np.int64) if plan.sampled_rows is None else plan.sampled_rows,
    )
    on_device = to_device((*top_k, *others), device)
    sink_slots, fresh_rows, fresh_slots, lost, lost_slots, sampled_rows = on_device[len(top_k) :]
    if missing:
        sinks.rows.index_copy_(1, lost_slots, sink_states(decoder, selective, lost))
    return Step(
        top_k=kind.of_arrays(plan, on_device[: len(top_k)]),
        attention=attention.plan(plan.batch, plan.selected_per_request),
        dense_attention=attention.plan(plan.batch, None),
        sink_slots=sink_slots,
        fresh_rows=fresh_rows,
        fresh_slots=fresh_slots,
        sampled_rows=None if plan.sampled_rows is None else sampled_rows,
        selected=[],
        sink_hits=len(tokens) - len(in_batch) - sink_misses,
        sink_misses=sink_misses,
    )


def _top_k_for(plan: Plan, device: torch.device) -> type[TopK]:
    if device.type == "cpu":
        return SegmentedTopK
    from orthorank_vllm.selection.topk_triton import LARGEST_WINDOW, SegmentedTopKTriton

    return SegmentedTopKTriton if 0 < plan.window <= LARGEST_WINDOW else SegmentedTopK
