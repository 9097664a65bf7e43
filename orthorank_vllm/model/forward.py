"""The sparse forward: stock layers, of which the selective ones update few rows.

So does the last layer, if it is dense: only rows that are sampled from are read after it.

Works on vLLM's own modules from outside: the compiled model is not entered and
no layer is replaced, so the dense path stays bit-identical to stock vLLM.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from orthorank_vllm.attention.backend import AttentionWay, QueryAttention
from orthorank_vllm.attention.kv_cache import read_back, write_kv
from orthorank_vllm.model.decoder import Decoder, DecoderLayer
from orthorank_vllm.model.kernels import add_and_norm
from orthorank_vllm.model.qkv import SplitWeight, project
from orthorank_vllm.model.sinks import SinkTable
from orthorank_vllm.model.tensor_parallel import of_first_rank
from orthorank_vllm.selection.plan import Ints, Plan
from orthorank_vllm.selection.topk import Competition
from orthorank_vllm.selection.transfer import to_device


class AnyCompetition(Protocol):
    """One of `selection.Competition` and `selection_kernels.PartedCompetition`."""

    @staticmethod
    def arrays_of(plan: Plan) -> tuple[Ints, ...]:
        """What is needed of it on the device."""

    @classmethod
    def of_arrays(cls, plan: Plan, arrays: Sequence[torch.Tensor]) -> "AnyCompetition":
        """Of these, once they are there."""

    def rows(
        self, stream: torch.Tensor, sink_rows: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """See `Competition.rows`."""


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
        sink_slots: [R] rows of the sink table, one for each competing request.
        fresh_rows, fresh_slots: rows of this batch that are a position 0, and
            the slots that they renew.
        read: [N] int64, the rows whose output is read; None: all.
        selected: each selective layer's rows, [plan.num_selected] int64.
        sink_hits, sink_misses: see `Outcome`.
    """

    competition: AnyCompetition
    attention: QueryAttention
    dense_attention: QueryAttention
    sink_slots: torch.Tensor
    fresh_rows: torch.Tensor
    fresh_slots: torch.Tensor
    read: torch.Tensor | None
    selected: list[torch.Tensor]
    sink_hits: int
    sink_misses: int

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
    attention: AttentionWay,
    plan: Plan,
    positions: torch.Tensor,
    stream: torch.Tensor,
    delta: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, Outcome]:
    """Prefill through this stage's layers, the selective ones in place.

    Args:
        selective: this stage's, by layer index.
        positions: [tokens].
        stream, delta: [tokens, hidden], whose sum is the residual stream that enters the first
            layer here; vLLM's layers hand it on in two summands. Both are used up.

    Returns:
        the same after the last layer here, right in the rows `plan.read`, and what to count.
    """
    step = _start_step(decoder, selective, sinks, attention, plan, positions.device)
    for index, layer in decoder.layers.items():
        if index in selective:
            kept = selective[index]
            sink_rows = sinks.rows[kept.sink_row]
            stream = _selective_layer(layer, step, sink_rows, kept.split, positions, stream, delta)
            delta = None
        elif index == decoder.last_layer and step.read is not None:
            of_read = attention.of_some(plan.batch, plan.read_per_request)
            stream = _last_layer(layer, of_read, step.read, positions, stream, delta)
            delta = None
        else:
            delta, stream = _dense_layer(layer, step.dense_attention, positions, stream, delta)
    skipped = plan.num_tokens - plan.num_selected + step.duplicates
    return stream, delta, Outcome(skipped, step.sink_hits, step.sink_misses)


def sink_states(
    decoder: Decoder, selective: dict[int, SelectiveLayer], tokens: torch.Tensor
) -> torch.Tensor:
    """Position 0's residual stream entering each selective layer, for some token ids.

    Only for a decoder that is the whole model.

    Attention over a single key returns its value, as the KV cache would hold it; none is touched.

    Args:
        tokens: [M] int64.

    Returns:
        [selective layers, M, hidden].
    """
    states = []
    stream = decoder.embed(tokens)
    delta: torch.Tensor | None = None
    for index, layer in decoder.layers.items():
        normed, stream = add_and_norm(layer.input_norm, stream, delta)
        delta = None
        if index in selective:
            states.append(stream.clone())  # later layers add to it in place
            continue
        attn = layer.attn
        qkv, _ = attn.qkv_proj(normed)
        value = read_back(attn.attn, qkv[:, -attn.kv_size :])
        value = value.unflatten(-1, (attn.num_kv_heads, attn.head_dim))
        per_head = value.repeat_interleave(attn.num_heads // attn.num_kv_heads, dim=1)
        delta = layer.after_attention(per_head.flatten(1))
        normed, stream = add_and_norm(layer.post_norm, stream, delta)
        delta = layer.after_feed_forward(normed)
    return torch.stack(states)


def _start_step(
    decoder: Decoder,
    selective: dict[int, SelectiveLayer],
    sinks: SinkTable,
    attention: AttentionWay,
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
    kind = _kind_of_competition(plan, device)
    competition = kind.arrays_of(plan)
    others = (
        np.array(slots, dtype=np.int64),
        plan.sink_row[in_batch],
        np.array([slots[r] for r in in_batch], dtype=np.int64),
        np.array(missing, dtype=np.int64),
        np.array([slot_of_token[token] for token in missing], dtype=np.int64),
        np.zeros(0, dtype=np.int64) if plan.read is None else plan.read,
    )
    on_device = to_device((*competition, *others), device)
    sink_slots, fresh_rows, fresh_slots, lost, lost_slots, read = on_device[len(competition) :]
    if missing:
        sinks.rows.index_copy_(1, lost_slots, sink_states(decoder, selective, lost))
    return Step(
        competition=kind.of_arrays(plan, on_device[: len(competition)]),
        attention=attention.of_some(plan.batch, plan.selected_per_request),
        dense_attention=attention.of_all(plan.batch),
        sink_slots=sink_slots,
        fresh_rows=fresh_rows,
        fresh_slots=fresh_slots,
        read=None if plan.read is None else read,
        selected=[],
        sink_hits=len(tokens) - len(in_batch) - sink_misses,
        sink_misses=sink_misses,
    )


def _kind_of_competition(plan: Plan, device: torch.device) -> type[AnyCompetition]:
    if device.type == "cpu":
        return Competition
    from orthorank_vllm.selection.topk_triton import LARGEST_WINDOW, PartedCompetition

    return PartedCompetition if 0 < plan.window <= LARGEST_WINDOW else Competition


def _dense_layer(
    layer: DecoderLayer,
    attention: QueryAttention,
    positions: torch.Tensor,
    stream: torch.Tensor,
    delta: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer's own forward does (llama.py), by the fast kernels."""
    normed, stream = add_and_norm(layer.input_norm, stream, delta)
    attn = layer.attn
    qkv, _ = attn.qkv_proj(normed)
    query, key, value = qkv.split([attn.q_size, attn.kv_size, attn.kv_size], dim=-1)
    query, key = layer.queries_and_keys(positions, query, key)
    delta = layer.after_attention(attention(attn.attn, query, key, value, None, positions))
    normed, stream = add_and_norm(layer.post_norm, stream, delta)
    return layer.after_feed_forward(normed), stream


def _selective_layer(
    layer: DecoderLayer,
    step: Step,
    sink_rows: torch.Tensor,
    split: SplitWeight | None,
    positions: torch.Tensor,
    stream: torch.Tensor,
    delta: torch.Tensor | None,
) -> torch.Tensor:
    """One selective layer.

    Args:
        sink_rows: [capacity, hidden], this layer's part of the sink table.

    Returns:
        [tokens, hidden] the residual stream, its selected rows updated.
    """
    normed, stream = add_and_norm(layer.input_norm, stream, delta)
    if len(step.fresh_rows):
        sink_rows.index_copy_(0, step.fresh_slots, stream.index_select(0, step.fresh_rows))
    rows = of_first_rank(step.competition.rows(stream, sink_rows, step.sink_slots))
    step.selected.append(rows)
    return _update(layer, step.attention, rows, split, positions, stream, normed)


def _last_layer(
    layer: DecoderLayer,
    attention: QueryAttention,
    rows: torch.Tensor,
    positions: torch.Tensor,
    stream: torch.Tensor,
    delta: torch.Tensor | None,
) -> torch.Tensor:
    """A dense last layer, whose unread rows nobody will miss; their K and V are written.

    Args:
        rows: [N] int64, those that are read.

    Returns:
        [tokens, hidden] the residual stream, right in these rows.
    """
    normed, stream = add_and_norm(layer.input_norm, stream, delta)
    return _update(layer, attention, rows, None, positions, stream, normed)


def _update(
    layer: DecoderLayer,
    attention: QueryAttention,
    rows: torch.Tensor,
    split: SplitWeight | None,
    positions: torch.Tensor,
    stream: torch.Tensor,
    normed: torch.Tensor,
) -> torch.Tensor:
    """K and V of all rows, everything else of a layer for some.

    Args:
        rows: [selected] int64, grouped by request as `attention` expects.
        stream: [tokens, hidden]; used up.
        normed: [tokens, hidden] it, normalised.

    Returns:
        [tokens, hidden] the residual stream, these rows updated.
    """
    attn = layer.attn
    key, value, query_of = project(attn, split, normed)
    key = layer.keys(positions, key)
    if not len(rows):
        write_kv(attn.attn, key, value)
        return stream
    positions = positions.index_select(0, rows)
    query = layer.queries(positions, query_of(rows))
    delta = layer.after_attention(attention(attn.attn, query, key, value, rows, positions))
    normed, updated = add_and_norm(layer.post_norm, stream.index_select(0, rows), delta)
    return stream.index_copy_(0, rows, updated.add_(layer.after_feed_forward(normed)))
