"""The sparse forward: a walk through vLLM's layers, of which the selective ones compute few rows.

So does the last layer, if it is dense: only rows that are sampled from are read after it.

Works on vLLM's own modules from outside: the compiled model is not entered and
no layer is replaced, so the dense path stays bit-identical to stock vLLM.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from orthorank_vllm.attention.backend import AttentionBackend, AttentionPlan
from orthorank_vllm.model.adapters import RowAdapters
from orthorank_vllm.model.decoder import Decoder, Pick
from orthorank_vllm.model.lost_sinks import recompute_sinks
from orthorank_vllm.model.qkv import SplitWeight
from orthorank_vllm.model.sinks import SinkTable
from orthorank_vllm.model.stand_in import FusedStandIn
from orthorank_vllm.model.tensor_parallel import of_first_rank
from orthorank_vllm.selection.plan import Ints, Plan
from orthorank_vllm.selection.quotas import Quota
from orthorank_vllm.selection.topk import SegmentedTopK, to_device


class TopK(Protocol):
    """One of `topk.SegmentedTopK` and `topk_triton.SegmentedTopKTriton`."""

    @staticmethod
    def arrays_of(plan: Plan) -> tuple[Ints, ...]:
        """What is needed of them all on the device."""

    @classmethod
    def of_arrays(cls, plan: Plan, arrays: Sequence[torch.Tensor]) -> "Mapping[Quota, TopK]":
        """Those of these arrays, once they are on the device, by quota."""

    def rows(
        self, residual: torch.Tensor, sink_rows: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """Rows to update, ascending; see `SegmentedTopK.rows`."""

    def rows_by_error(self, errors: torch.Tensor) -> torch.Tensor:
        """Rows to update, ascending; see `SegmentedTopK.rows_by_error`."""


@dataclass
class SelectiveLayer:
    """What is kept for one selective layer.

    Attributes:
        place: in the selective layers' order.
        sink_row: its index in the sink table; None where no token is compared with the sink.
        split: its QKV weight cut in two, where that can be done.
        stand_in: what its skipped rows get in place of an update.
    """

    place: int
    sink_row: int | None
    split: SplitWeight | None = None
    stand_in: FusedStandIn | None = None

    def place_stand_in(self, device: torch.device) -> None:
        """Bring it to a device, if it is not there; see `stand_in.stand_ins_to_add`."""
        if self.stand_in is not None and self.stand_in.down.device.type != device.type:
            self.stand_in = self.stand_in.to(device)


@dataclass
class Step:
    """What the selective layers of one forward share.

    Attributes:
        top_k: what chooses, by quota, where there is something to choose.
        rows: [selected] int64, where there is not.
        attention: of selected rows, by quota.
        dense_attention: of all rows.
        sink_slots: [R] rows of the sink table, one for each request that has candidates.
        fresh_rows, fresh_slots: rows of this batch that are a position 0, and
            the slots that they renew.
        sampled_rows: [N] int64, the rows whose output is read; None: all.
        sink_hits, sink_misses: see `Outcome`.
    """

    top_k: Mapping[Quota, TopK]
    rows: Mapping[Quota, torch.Tensor]
    attention: Mapping[Quota, AttentionPlan]
    dense_attention: AttentionPlan
    sink_slots: torch.Tensor
    fresh_rows: torch.Tensor
    fresh_slots: torch.Tensor
    sampled_rows: torch.Tensor | None
    sink_hits: int
    sink_misses: int

    def pick(
        self,
        layer: SelectiveLayer | None,
        quota: Quota | None,
        sinks: SinkTable,
        only: torch.Tensor | None,
    ) -> Pick | None:
        """The rows that a layer computes; None: all of them.

        Args:
            layer: None for a dense one.
            quota: None where no request skips anything.
            only: these rows, whatever the layer is.
        """
        if layer is None:
            return None if only is None else lambda *_: only

        def choose(residual: torch.Tensor, normed: torch.Tensor) -> torch.Tensor | None:
            # Even where nothing is chosen: a later chunk, all of whose rows are read, may need it,
            # and a request that skips tokens in more layers than any here.
            sink_rows = self._renewed(layer, sinks, residual)
            if only is not None or quota is None:
                return only
            if quota not in self.top_k:
                return self.rows[quota]
            top_k = self.top_k[quota]
            if layer.stand_in is not None and layer.stand_in.knows_errors:
                return of_first_rank(top_k.rows_by_error(layer.stand_in.errors(normed)))
            assert sink_rows is not None
            return of_first_rank(top_k.rows(residual, sink_rows, self.sink_slots))

        return choose

    def _renewed(
        self, layer: SelectiveLayer, sinks: SinkTable, residual: torch.Tensor
    ) -> torch.Tensor | None:
        """The layer's part of the sink table, with this batch's own; None if it scores nothing."""
        if layer.sink_row is None:
            return None
        sink_rows = sinks.rows[layer.sink_row]
        if len(self.fresh_rows):
            fresh = residual.index_select(0, self.fresh_rows)
            sink_rows.index_copy_(0, self.fresh_slots, fresh)
        return sink_rows


@dataclass(frozen=True)
class Outcome:
    """What a sparse forward leaves to be counted.

    Attributes:
        quotas: of this stage's selective layers in which something was skipped.
        sink_hits, sink_misses: requests whose position 0 this forward lacks, by whether the
            table had its state or it was recomputed.
        stand_in_rank: of all stand-ins that were added, together.
    """

    quotas: Mapping[int, Quota]
    sink_hits: int
    sink_misses: int
    stand_in_rank: int = 0


def sparse_forward(
    decoder: Decoder,
    selective: Mapping[int, SelectiveLayer],
    sinks: SinkTable,
    attention: AttentionBackend,
    plan: Plan,
    positions: torch.Tensor,
    residual: torch.Tensor,
    update: torch.Tensor | None,
    adapters: RowAdapters | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor], Outcome]:
    """Prefill through this stage's layers, the selective ones in place.

    Args:
        selective: this stage's, by layer index.
        positions: [tokens].
        residual, update: [tokens, hidden], see `DecoderLayer.forward`.
        adapters: of all tokens; None: none has one.

    Returns:
        residual, update: the same after the last layer here, right in the rows
            `plan.sampled_rows`.
        told: [tokens, hidden] each, the residual stream at `decoder.told_layers`.
        outcome: what to count.
    """
    step = _start_step(decoder, selective, sinks, attention, plan, positions.device, adapters)
    stand_in_rank = 0
    quotas: dict[int, Quota] = {}
    told: list[torch.Tensor] = []
    told_layers = decoder.told_layers
    for index, layer in decoder.layers.items():
        if index in told_layers:
            told.append(_stream(residual, update))
        kept = selective.get(index)
        quota = None if kept is None else plan.quotas[kept.place]
        split, stand_in, attend = None, None, step.dense_attention
        if kept is not None and quota is not None:
            quotas[index] = quota
            split, stand_in, attend = kept.split, kept.stand_in, step.attention[quota]
        # Unread rows nobody will miss; their K and V are written.
        only = step.sampled_rows if index == decoder.last_layer else None
        if only is not None:
            stand_in = None
            attend = attention.plan(plan.batch, plan.sampled_per_request)
        if stand_in is not None:
            stand_in_rank += stand_in.rank
        pick = step.pick(kept, quota, sinks, only)
        residual, update = layer.forward(
            attend, positions, residual, update, pick, split, stand_in, adapters
        )
    if decoder.is_last and decoder.last_layer + 1 in told_layers:
        told.append(_stream(residual, update))
    outcome = Outcome(quotas, step.sink_hits, step.sink_misses, stand_in_rank)
    return residual, update, told, outcome


def _stream(residual: torch.Tensor, update: torch.Tensor | None) -> torch.Tensor:
    # A copy: layers use their summands up.
    return residual.clone() if update is None else residual + update


class _Sinks(NamedTuple):
    """Arrays of a step's sinks on the host, and what was found; see `Step`.

    Attributes:
        lost, lost_slots: token ids whose states are to be computed, and their slots.
        lost_rows: for each a row that has its adapter.
        lost_embeddings: what stands in place of some of these token ids.
    """

    slots: Ints
    fresh_rows: Ints
    fresh_slots: Ints
    lost: Ints
    lost_slots: Ints
    lost_rows: Ints
    lost_embeddings: Mapping[int, torch.Tensor]
    hits: int
    misses: int


_NOTHING = np.zeros(0, dtype=np.int64)
_NO_SINKS = _Sinks(_NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, {}, 0, 0)


def _look_up(sinks: SinkTable, plan: Plan) -> _Sinks:
    wanted = [plan.batch.sinks[request] for request in plan.requests.tolist()]
    slots, missing = sinks.reserve(wanted)
    in_batch = [r for r, row in enumerate(plan.sink_row.tolist()) if row >= 0]
    fresh = {wanted[r] for r in in_batch}
    missing = [sink for sink in missing if sink not in fresh]
    # No request whose position 0 is in the batch has a missing sink.
    misses = sum(sink in missing for sink in wanted)
    lost = [wanted.index(sink) for sink in missing]
    lost_requests = plan.requests[lost]
    given = plan.batch.first_embedding
    return _Sinks(
        slots=np.array(slots, dtype=np.int64),
        fresh_rows=plan.sink_row[in_batch],
        fresh_slots=np.array([slots[r] for r in in_batch], dtype=np.int64),
        lost=plan.batch.first_token[lost_requests],
        lost_slots=np.array([slots[r] for r in lost], dtype=np.int64),
        lost_rows=plan.batch.first_row[lost_requests],
        lost_embeddings={
            place: given[request]
            for place, request in enumerate(lost_requests.tolist())
            if request in given
        },
        hits=len(wanted) - len(in_batch) - misses,
        misses=misses,
    )


def _start_step(
    decoder: Decoder,
    selective: Mapping[int, SelectiveLayer],
    sinks: SinkTable,
    attention: AttentionBackend,
    plan: Plan,
    device: torch.device,
    adapters: RowAdapters | None = None,
) -> Step:
    # All stages keep their tables alike, whichever of them scores.
    is_whole = decoder.is_first and decoder.is_last
    needs_sinks = plan.scored and (len(sinks.rows) or not is_whole)
    found = _look_up(sinks, plan) if needs_sinks else _NO_SINKS
    kind = _top_k_for(plan, device)
    top_k = kind.arrays_of(plan) if plan.scored else ()
    sampled = _NOTHING if plan.sampled_rows is None else plan.sampled_rows
    known = {quota: quota.rows for quota in plan.different_quotas if quota.rows is not None}
    on_device = to_device((sampled, *found[:6], *known.values(), *top_k), device)
    sampled_rows, slots, fresh_rows, fresh_slots, lost, lost_slots, lost_rows = on_device[:7]
    known_rows, of_top_k = on_device[7 : 7 + len(known)], on_device[7 + len(known) :]
    if len(found.lost):
        scored = [index for index, kept in selective.items() if kept.sink_row is not None]
        of_lost = None if adapters is None else adapters.of(lost_rows)
        recompute_sinks(decoder, scored, sinks, lost, lost_slots, of_lost, found.lost_embeddings)
    return Step(
        top_k=kind.of_arrays(plan, of_top_k) if top_k else {},
        rows=dict(zip(known, known_rows, strict=True)),
        attention={
            quota: attention.plan(plan.batch, quota.selected_per_request)
            for quota in plan.different_quotas
        },
        dense_attention=attention.plan(plan.batch, None),
        sink_slots=slots,
        fresh_rows=fresh_rows,
        fresh_slots=fresh_slots,
        sampled_rows=None if plan.sampled_rows is None else sampled_rows,
        sink_hits=found.hits,
        sink_misses=found.misses,
    )


def _top_k_for(plan: Plan, device: torch.device) -> type[TopK]:
    if device.type == "cpu":
        return SegmentedTopK
    from orthorank_vllm.selection.topk_triton import LARGEST_WINDOW, SegmentedTopKTriton

    return SegmentedTopKTriton if 0 < plan.window <= LARGEST_WINDOW else SegmentedTopK
