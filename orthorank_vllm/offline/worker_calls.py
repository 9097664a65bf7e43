"""What the calibrating process asks of the workers, all of them at once.

Each function runs in every worker, called with `Workers.call`; the answer that
counts is the first one's. All ranks follow the same calls, so their shards of
one forward meet.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from vllm.forward_context import set_forward_context

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.offline.texts import Forward, TextScore
from orthorank_vllm.selection.method import Method

_Answer = TypeVar("_Answer")


def _in_forward_context(function: Callable[..., _Answer]) -> Callable[..., _Answer]:
    """Run a call in the context in which vLLM runs a model: there experts are looked up by name."""

    @functools.wraps(function)
    def in_context(worker: Any, *args: Any) -> _Answer:
        with torch.inference_mode(), set_forward_context(None, worker.vllm_config):
            return function(worker, *args)

    return in_context


class _Step:
    """One step of the greedy choice: layers tried in ascending order share the part below.

    Each forward goes through all layers before the next does: what they hold on the way, far
    more than their residual streams, is held once.
    """

    def __init__(self, forwards: Sequence[Forward], chosen: Sequence[int], num_layers: int) -> None:
        self._forwards = forwards
        self._chosen = frozenset(chosen)
        self._num_layers = num_layers
        self._below = [forward.embed() for forward in forwards]
        self._next_layer = 0

    def loss_with(self, layer: int | None) -> float | None:
        """Mean negative log-probability with `layer` chosen as well, in nats per token."""
        chosen = self._chosen
        if layer is not None:
            assert layer >= self._next_layer, "layers are tried in ascending order"
            passed = range(self._next_layer, layer)
            for index, forward in enumerate(self._forwards):
                self._below[index] = forward.through(self._below[index], passed, self._chosen)
            self._next_layer = layer
            chosen = chosen | {layer}
        above = range(self._next_layer, self._num_layers)
        log_prob, scored, is_told = 0.0, 0, True
        for forward, below in zip(self._forwards, self._below, strict=True):
            lengths = forward.texts.batch.query_len
            residual = forward.through(below.clone(), above, chosen)
            scores = forward.log_probs(residual, [1] * len(lengths))
            # Not the end of it: the other ranks' logits come from this one too.
            is_told = scores is not None
            log_prob += sum(score.log_prob for score in scores or ())
            scored += int((lengths - 1).sum())
        return -log_prob / scored if is_told else None


@_in_forward_context
def use_texts(worker: Any, texts: Sequence[Sequence[int]], method: Method) -> None:
    """Take these texts, token ids, and this method for the steps to come."""
    model = worker.get_model()
    worker.orthorank_forwards = [Forward(model, [text], method) for text in texts]


@_in_forward_context
def start_step(worker: Any, chosen: Sequence[int]) -> None:
    """Start over from the embeddings, with some layers chosen already."""
    model = worker.get_model().model
    worker.orthorank_step = _Step(worker.orthorank_forwards, chosen, len(model.layers))


@_in_forward_context
def loss_with(worker: Any, layer: int | None) -> float | None:
    """Mean loss of the step under way with one more layer chosen, in nats per token."""
    loss: float | None = worker.orthorank_step.loss_with(layer)
    return loss


@_in_forward_context
def score_texts(
    worker: Any,
    texts: Sequence[Sequence[int]],
    first_scored: Sequence[int],
    chosen: Sequence[int],
    method: Method,
) -> list[TextScore] | None:
    """Score each text's tokens from a position on; None where a worker has no logits."""
    model = worker.get_model()
    forward = Forward(model, texts, method)
    residual = forward.through(forward.embed(), range(len(model.model.layers)), frozenset(chosen))
    return forward.log_probs(residual, first_scored)


@_in_forward_context
def cosines_to_sink(worker: Any, text: Sequence[int]) -> list[list[float]]:
    """|cos| between each token's residual stream and the sink's, dense: [layers][positions]."""
    model = worker.get_model()
    forward = Forward(model, [text], Method())
    residual = forward.embed()
    rows = []
    for index in range(len(model.model.layers)):
        states = residual.float()
        rows.append(torch.cosine_similarity(states, states[:1], dim=-1).abs().cpu().tolist())
        residual = forward.through(residual, [index], frozenset())
    return rows


def fingerprint(worker: Any) -> str | None:
    """The fingerprint of a worker's weights, None where it has none."""
    value: str | None = worker.get_model().fingerprint.value
    return value


def forget_texts(worker: Any) -> None:
    """Free what the functions above keep."""
    for name in ("orthorank_forwards", "orthorank_step"):
        if name in vars(worker):
            delattr(worker, name)


def use_layers(worker: Any, settings: dict[str, Any]) -> None:
    """Hand the final configuration to the OrthoRank model of this worker."""
    worker.get_model().orthorank.use_layers(OrthoRankConfig.from_dict(settings))
