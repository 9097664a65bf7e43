"""The sparse forward: stock layers, of which the selective ones update few rows.

So does the last layer, if it is dense: only rows that are sampled from are read after it.

Works on vLLM's own modules from outside: the compiled model is not entered and
no layer is replaced, so the dense path stays bit-identical to stock vLLM.
"""

from dataclasses import dataclass
from typing import Any

import torch

from orthorank_vllm.attention import SparseAttention
from orthorank_vllm.engine.kernels import add_and_norm
from orthorank_vllm.engine.parts import Decoder, DecoderLayer
from orthorank_vllm.engine.projections import SplitWeight, project
from orthorank_vllm.engine.ranks import of_first_rank
from orthorank_vllm.engine.sinks import SinkTable
from orthorank_vllm.plan import Ints, Plan
from orthorank_vllm.selection import Competition, score, select


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
        selected: each selective layer's rows, [plan.num_selected] int64.
        sink_hits, sink_misses: see `Outcome`.
    """

    competition: Competition
    attention: SparseAttention
    dense_attention: SparseAttention
    sink_slots: torch.Tensor
    fresh_rows: torch.Tensor
    fresh_slots: torch.Tensor
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
    step = _start_step(decoder, selective, sinks, plan, positions.device)
    for index, layer in decoder.layers.items():
        if index in selective:
            kept = selective[index]
            sink_rows = sinks.rows[kept.sink_row]
            stream = _selective_layer(layer, step, sink_rows, kept.split, positions, stream, delta)
            delta = None
        elif index == decoder.last_layer and plan.read is not None:
            stream = _last_layer(layer, plan, plan.read, positions, stream, delta)
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

    Attention over a single key returns its value, so no KV cache is touched.

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
        value = qkv[:, -attn.kv_size :].unflatten(-1, (attn.num_kv_heads, attn.head_dim))
        per_head = value.repeat_interleave(attn.num_heads // attn.num_kv_heads, dim=1)
        delta = layer.after_attention(per_head.flatten(1))
        normed, stream = add_and_norm(layer.post_norm, stream, delta)
        delta = layer.after_feed_forward(normed)
    return torch.stack(states)


def _start_step(
    decoder: Decoder,
    selective: dict[int, SelectiveLayer],
    sinks: SinkTable,
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

    def on_device(values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int64).to(device, non_blocking=True)

    if missing:
        slot_of_token = dict(zip(tokens, slots, strict=True))
        sinks.rows.index_copy_(
            1,
            on_device([slot_of_token[token] for token in missing]),
            sink_states(decoder, selective, on_device(missing)),
        )
    return Step(
        competition=Competition.of(plan, device),
        attention=SparseAttention(plan.batch, plan.selected_per_request),
        dense_attention=SparseAttention(plan.batch, plan.batch.query_len),
        sink_slots=on_device(slots),
        fresh_rows=on_device(plan.sink_row[in_batch]),
        fresh_slots=on_device([slots[r] for r in in_batch]),
        selected=[],
        sink_hits=len(tokens) - len(in_batch) - sink_misses,
        sink_misses=sink_misses,
    )


def _dense_layer(
    layer: DecoderLayer,
    attention: SparseAttention,
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
    attention.write_kv(attn.attn, key, value)
    delta = layer.after_attention(attention(attn.attn, query, key, value, positions))
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
    sink_rows.index_copy_(0, step.fresh_slots, stream[step.fresh_rows])
    scores = score(stream, sink_rows[step.sink_slots], step.competition)
    rows = of_first_rank(select(scores, step.competition))
    step.selected.append(rows)
    return _update(layer, step.attention, rows, split, positions, stream, normed)


def _last_layer(
    layer: DecoderLayer,
    plan: Plan,
    read: Ints,
    positions: torch.Tensor,
    stream: torch.Tensor,
    delta: torch.Tensor | None,
) -> torch.Tensor:
    """A dense last layer, whose unread rows nobody will miss; their K and V are written.

    Returns:
        [tokens, hidden] the residual stream, right in the rows `read`, the plan's.
    """
    normed, stream = add_and_norm(layer.input_norm, stream, delta)
    rows = torch.from_numpy(read).to(stream.device, non_blocking=True)
    attention = SparseAttention(plan.batch, plan.read_per_request)
    return _update(layer, attention, rows, None, positions, stream, normed)


def _update(
    layer: DecoderLayer,
    attention: SparseAttention,
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
    attention.write_kv(attn.attn, key, value)
    if not len(rows):
        return stream
    positions = positions[rows]
    query = layer.queries(positions, query_of(rows))
    delta = layer.after_attention(attention(attn.attn, query, key, value, positions))
    normed, updated = add_and_norm(layer.post_norm, stream[rows], delta)
    return stream.index_copy_(0, rows, updated.add_(layer.after_feed_forward(normed)))
