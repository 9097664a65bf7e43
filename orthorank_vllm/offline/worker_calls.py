"""What the calibrating process asks of the workers, all of them at once.

Each function runs in every worker, called with `Workers.call`; the answer that
counts is the first one's. All ranks follow the same calls, so their shards of
one forward meet.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from vllm.forward_context import set_forward_context

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.model.stand_in import FusedStandIn, StandIn
from orthorank_vllm.offline.served import (
    Answered,
    AnswerLoss,
    DenseAnswers,
    ServedStep,
    groups_of,
)
from orthorank_vllm.offline.stand_in_fit import fit_all
from orthorank_vllm.offline.texts import Forward, TextScore
from orthorank_vllm.selection.method import Method

_Answer = TypeVar("_Answer")


def in_forward_context(function: Callable[..., _Answer]) -> Callable[..., _Answer]:
    """Run a call in the context in which vLLM runs a model: there experts are looked up by name."""

    @functools.wraps(function)
    def in_context(worker: Any, *args: Any) -> _Answer:
        with torch.inference_mode(), set_forward_context(None, worker.vllm_config):
            return function(worker, *args)

    return in_context


@in_forward_context
def use_texts(
    worker: Any, name: str, texts: Sequence[Answered], method: Method, keeps: Sequence[float]
) -> list[AnswerLoss] | None:
    """Take these texts and this method for the steps to come.

    Args:
        name: by which the steps call them.
        keeps: those that layers will be tried with.

    Returns:
        Each text's loss in the dense model: its likelihood, and what is found.
    """
    model = worker.get_model()
    groups = [DenseAnswers(model, group, method, keeps) for group in groups_of(texts)]
    _kept(worker)[name] = groups
    answers = [group.losses_of_dense() for group in groups]
    told = [answer for answer in answers if answer is not None]
    return list(itertools.chain.from_iterable(told)) if len(told) == len(answers) else None


@in_forward_context
def start_step(worker: Any, name: str, chosen: Mapping[int, float]) -> None:
    """Start over, with some layers chosen already, each with its keep."""
    num_layers = len(worker.get_model().model.layers)
    stand_ins = _stand_ins(worker)
    worker.orthorank_step = ServedStep(_kept(worker)[name], chosen, num_layers, stand_ins)


@in_forward_context
def losses_with(worker: Any, more: Mapping[int, float]) -> list[AnswerLoss] | None:
    """Each text's loss with more layers chosen; the lowest of them in ascending order."""
    losses: list[AnswerLoss] | None = worker.orthorank_step.losses_with(more)
    return losses


def _kept(worker: Any) -> dict[str, list[DenseAnswers]]:
    if "orthorank_texts" not in vars(worker):
        worker.orthorank_texts = {}
    texts: dict[str, list[DenseAnswers]] = worker.orthorank_texts
    return texts


@in_forward_context
def score_texts(
    worker: Any,
    texts: Sequence[Sequence[int]],
    first_scored: Sequence[int],
    chosen: Mapping[int, float],
    method: Method,
    is_served: bool,
) -> list[TextScore] | None:
    """Score each text's tokens from a position on; None where a worker has no logits.

    Args:
        is_served: what is scored is an answer, and dense; else prompt, as papers measure.
    """
    model = worker.get_model()
    prompt_lens = first_scored if is_served else None
    forward = Forward(model, texts, method, prompt_lens, chosen.values())
    layers = range(len(model.model.layers))
    residual = forward.through(forward.embed(), layers, chosen, _stand_ins(worker))
    return forward.log_probs(residual, first_scored)


@in_forward_context
def cosines_to_sink(worker: Any, text: Sequence[int]) -> list[list[float]]:
    """|cos| between each token's residual stream and the sink's, dense: [layers][positions]."""
    model = worker.get_model()
    forward = Forward(model, [text], Method())
    residual = forward.embed()
    rows = []
    for index in range(len(model.model.layers)):
        states = residual.float()
        rows.append(torch.cosine_similarity(states, states[:1], dim=-1).abs().cpu().tolist())
        residual = forward.through(residual, [index], {})
    return rows


@in_forward_context
def fit_stand_ins(
    worker: Any, texts: Sequence[Sequence[int]], held_back: Sequence[Sequence[int]]
) -> dict[int, StandIn]:
    """The stand-in of every layer; see `stand_in_fit.fit_all`."""
    return fit_all(worker.get_model(), texts, held_back)


def use_stand_ins(worker: Any, stand_ins: Mapping[int, StandIn]) -> None:
    """Put these in place of what chosen layers leave out, from now on."""
    weight = worker.get_model().model.norm.weight
    worker.orthorank_stand_ins = {
        layer: stand_in.fused(weight.device, weight.dtype) for layer, stand_in in stand_ins.items()
    }


def _stand_ins(worker: Any) -> dict[int, FusedStandIn]:
    stand_ins: dict[int, FusedStandIn] = vars(worker).get("orthorank_stand_ins", {})
    return stand_ins


def fingerprint(worker: Any) -> str | None:
    """The fingerprint of a worker's weights, None where it has none."""
    value: str | None = worker.get_model().fingerprint.value
    return value


def forget_texts(worker: Any) -> None:
    """Free what the functions above keep."""
    for name in ("orthorank_texts", "orthorank_step"):
        if name in vars(worker):
            delattr(worker, name)


def use_layers(worker: Any, settings: dict[str, Any]) -> None:
    """Hand the final configuration to the OrthoRank model of this worker.

    With the stand-ins that were fitted here, if any were: no other worker's file is needed then.
    """
    fitted = vars(worker).pop("orthorank_stand_ins", None)
    config = OrthoRankConfig.from_dict(settings)
    worker.get_model().orthorank.use_layers(config, fitted)
    if config.maker:
        # A KV connector is made here later, of this.
        worker.vllm_config.additional_config["orthorank"] = settings
