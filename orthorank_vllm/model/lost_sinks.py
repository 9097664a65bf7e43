"""The sink's states that neither this forward nor the table has, computed anew."""

from collections.abc import Collection, Mapping

import torch

from orthorank_vllm.attention.one_key import OneKeyAttention
from orthorank_vllm.model.adapters import RowAdapters
from orthorank_vllm.model.decoder import Decoder
from orthorank_vllm.model.sinks import SinkTable

# Computed together: with a step's worth of them, their states in all layers would take more memory
# than the step that vLLM measured.
AT_ONCE = 64


def recompute_sinks(
    decoder: Decoder,
    scored: Collection[int],
    sinks: SinkTable,
    tokens: torch.Tensor,
    slots: torch.Tensor,
    adapters: RowAdapters | None = None,
    embeddings: Mapping[int, torch.Tensor] | None = None,
) -> None:
    """Write some states into the table.

    Args:
        scored: layers, ascending.
        tokens, slots: [M] int64, at least one.
        adapters: that each is to have.
        embeddings: [hidden] what stands in place of some of the tokens, on the host.
    """
    residual = decoder.embed(tokens, adapters)
    if embeddings:
        given = torch.stack([row.to(residual.dtype) for row in embeddings.values()])
        places = torch.tensor(list(embeddings), device=residual.device)
        residual.index_copy_(0, places, decoder.entering(given.to(residual.device)))
    for some in torch.arange(len(tokens), device=tokens.device).split(AT_ONCE):
        states = sink_states(
            decoder, scored, residual[some], None if adapters is None else adapters.of(some)
        )
        sinks.rows.index_copy_(1, slots[some], states)


def sink_states(
    decoder: Decoder,
    scored: Collection[int],
    residual: torch.Tensor,
    adapters: RowAdapters | None = None,
) -> torch.Tensor:
    """Position 0's residual stream entering each layer that scores, for some tokens there.

    It is computed in every layer, so it is the dense model's. Only for a decoder that is the whole
    model.

    Args:
        scored: layers, ascending.
        residual: [M, hidden] entering the first layer; used up.
        adapters: that each is to have.

    Returns:
        [scored layers, M, hidden].
    """
    states: list[torch.Tensor] = []
    attention = OneKeyAttention()
    positions = torch.zeros(len(residual), dtype=torch.int64, device=residual.device)
    update: torch.Tensor | None = None
    for index, layer in decoder.layers.items():
        if index in scored:
            # A copy: what follows adds to it in place.
            states.append(residual.clone() if update is None else residual + update)
        if len(states) == len(scored):
            break
        residual, update = layer.forward(attention, positions, residual, update, adapters=adapters)
    return torch.stack(states)
