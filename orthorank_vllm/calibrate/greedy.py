"""The greedy choice: one layer at a time, always the one that costs least.

As in SLEB (arXiv 2402.09025), with the selection rule in place of removal.
Ranking the layers by what each costs alone is much worse: two layers that are
cheap one by one can be dear together.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

# Nats per token. Layers of a trained model differ by a thousand times as much; layers closer than
# this would be told apart by rounding.
SAME_LOSS = 1e-5


class Trial(Protocol):
    """A model on some text; losses are means in nats per token."""

    def start_step(self, chosen: Sequence[int]) -> None:
        """Begin a step, with these layers chosen."""

    def loss_with(self, layer: int | None) -> float:
        """The loss with one more layer chosen, or with none; layers in ascending order."""


class OutOfTime(Exception):
    """The time did not suffice to try every layer once."""


class NothingToTell(Exception):
    """The losses say nothing about the layers; why, in half a sentence."""


@dataclass
class Choice:
    """What has been chosen and measured so far; enough to go on from.

    Attributes:
        order: the layers chosen, the cheapest first.
        losses: the loss after each; None where a layer was taken untried.
        tried: of the step under way, the loss with each layer tried.
        costs: what each layer added to the loss when it was last tried.
        trials: how many were made in all.
        chance: the loss of a guess, ln(vocabulary); a model that is no better knows nothing of
            the text.
    """

    num_layers: int
    dense_loss: float | None = None
    order: list[int] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    tried: dict[int, float] = field(default_factory=dict)
    costs: dict[int, float] = field(default_factory=dict)
    trials: int = 0
    chance: float = math.inf

    @property
    def remaining(self) -> list[int]:
        return [layer for layer in range(self.num_layers) if layer not in self.order]

    @property
    def cheapest(self) -> list[int]:
        """The remaining layers by what they cost when last tried; never tried comes last."""
        return sorted(self.remaining, key=lambda layer: self.costs.get(layer, math.inf))


def choose(
    trial: Trial,
    choice: Choice,
    count: int,
    on_trial: Callable[[], None] = lambda: None,
    breadth: int | None = None,
) -> None:
    """Choose until there are `count` layers.

    Args:
        choice: changed in place; a step under way goes on.
        on_trial: called after each trial.
        breadth: layers tried in each step after the first, those that cost least
            when last tried; None: every remaining one.

    Raises:
        NothingToTell: all layers cost the same, or the model is no better than chance.
    """
    while len(choice.order) < count:
        # A choice that goes on has no costs yet, and tries every layer once more.
        layers = choice.remaining
        if choice.costs.keys() >= set(layers):
            layers = choice.cheapest[:breadth]
        _step(trial, choice, layers, on_trial, lambda: True)


def choose_within(
    trial: Trial,
    choice: Choice,
    count: int,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Choose within a time: after the first step only the cheapest layers are tried again.

    As many of them as the time allows. Where it runs out, the layers that cost
    least when last tried are taken untried.

    Args:
        choice: changed in place.

    Raises:
        NothingToTell: see `choose`.
        OutOfTime: not even the first step could be finished.
    """
    deadline = clock() + seconds
    last_end = clock()
    slowest = 0.0

    def note_pace() -> None:
        nonlocal last_end, slowest
        slowest, last_end = max(slowest, clock() - last_end), clock()

    def is_time_for_one_more() -> bool:
        return clock() + slowest < deadline

    steps_start = clock()
    candidates = choice.remaining
    _step(trial, choice, candidates, note_pace, is_time_for_one_more)
    if not choice.costs.keys() >= set(candidates):
        raise OutOfTime
    pace = (clock() - steps_start) / choice.trials
    while len(choice.order) < count and is_time_for_one_more():
        per_step = (deadline - clock()) / (count - len(choice.order))
        breadth = max(1, int(per_step / pace))
        _step(trial, choice, choice.cheapest[:breadth], note_pace, is_time_for_one_more)
    while len(choice.order) < count:
        choice.order.append(choice.cheapest[0])
        choice.losses.append(None)


def _step(
    trial: Trial,
    choice: Choice,
    layers: Sequence[int],
    on_trial: Callable[[], None],
    may_go_on: Callable[[], bool],
) -> None:
    trial.start_step(choice.order)
    if choice.dense_loss is None:
        choice.dense_loss = trial.loss_with(None)
    if not choice.dense_loss < choice.chance:
        raise NothingToTell(
            f"the dense model's loss, {choice.dense_loss:.4g} nats a token, is no better than "
            f"chance, {choice.chance:.4g}"
        )
    measured = [choice.dense_loss, *(loss for loss in choice.losses if loss is not None)]
    for layer in sorted(layers):
        if layer in choice.tried:
            continue
        if not may_go_on():
            break
        loss = trial.loss_with(layer)
        choice.tried[layer] = loss if math.isfinite(loss) else math.inf
        choice.trials += 1
        on_trial()
    for layer, loss in choice.tried.items():
        choice.costs[layer] = loss - measured[-1]
    if len(choice.tried) == choice.num_layers > 1:
        least, most = min(choice.tried.values()), max(choice.tried.values())
        if not most - least > SAME_LOSS:
            raise NothingToTell(
                f"with any of its {choice.num_layers} layers selective the model's loss is the "
                f"same, {least:.6g} nats a token"
            )
    # Only what was tried now: the costs of the others are of an earlier step, and too low.
    tried = choice.tried
    layer = min(tried, key=lambda layer: (tried[layer], layer)) if tried else choice.cheapest[0]
    choice.order.append(layer)
    choice.losses.append(tried.get(layer))
    choice.tried = {}
