"""The sink's states that neither this forward nor the table has, computed anew."""

from collections.abc import Collection

import torch

from orthorank_vllm.attention.one_key import OneKeyAttention
from orthorank_vllm.model.adapters import RowAdapters
from orthorank_vllm.model.decoder import Decoder
from orthorank_vllm.model.sinks import SinkTable

# Token ids computed together: with a step's worth of them, their states in all layers would take
# more memory than the step that vLLM measured.
AT_ONCE = 64


def recompute_sinks(
    decoder: Decoder,
    scored: Collection[int],
    sinks: SinkTable,
    tokens: torch.Tensor,
    slots: torch.Tensor,
    adapters: RowAdapters | None = None,
) -> None:
    """Write the states of some token ids into the table.

    Args:
        scored: layers, ascending.
        tokens, slots: [M] int64, at least one.
        adapters: that each token id is to have.
    """
    for some in torch.arange(len(tokens), device=tokens.device).split(AT_ONCE):
        states = sink_states(
            decoder, scored, tokens[some], None if adapters is None else adapters.of(some)
        )
        sinks.rows.index_copy_(1, slots[some], states)


def sink_states(
    decoder: Decoder,
    scored: Collection[int],
    tokens: torch.Tensor,
    adapters: RowAdapters | None = None,
) -> torch.Tensor:
    """Position 0's residual stream entering each layer that scores, for some token ids.

    It is computed in every layer, so it is the dense model's. Only for a decoder that is the whole
    model.

    Args:
        scored: layers, ascending.
        tokens: [M] int64.
        adapters: that each token id is to have.

    Returns:
        [scored layers, M, hidden].
    """
    states: list[torch.Tensor] = []
    attention, positions = OneKeyAttention(), torch.zeros_like(tokens)
    residual = decoder.embed(tokens, adapters)
    update: torch.Tensor | None = None
    for index, layer in decoder.layers.items():
        if index in scored:
            # A copy: what follows adds to it in place.
            states.append(residual.clone() if update is None else residual + update)
        if len(states) == len(scored):
            break
        residual, update = layer.forward(attention, positions, residual, update, adapters=adapters)
    return torch.stack(states)
