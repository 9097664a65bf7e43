"""Fit stand-ins: ridge regression of low rank, from what enters a layer to what it adds.

All layers' in one pass through the dense model, a layer at a time. Fitting a layer on states that
other layers' stand-ins have changed was measured to be no better, and the maps would then be those
of one set of layers alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from orthorank_vllm.model.decoder import Decoder
from orthorank_vllm.model.ops import add_and_norm
from orthorank_vllm.model.stand_in import STORED_DTYPE, StandIn
from orthorank_vllm.offline.served import TOKENS_PER_FORWARD
from orthorank_vllm.offline.texts import Forward, packed
from orthorank_vllm.selection.method import Method

RANK = 96
# Of the mean variance of what is mapped; the one that is best on held-back text is taken.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
# For what says how large a token's error will be.
ERROR_RIDGE = 1e-2


@dataclass
class Moments:
    """Sums over tokens of what enters a layer, x, and what it adds, y; float64.

    Attributes:
        x, y: [hidden].
        xx, xy: [hidden, hidden].
        yy: of squares.
    """

    count: int
    x: torch.Tensor
    y: torch.Tensor
    xx: torch.Tensor
    xy: torch.Tensor
    yy: torch.Tensor

    @classmethod
    def of(cls, entering: torch.Tensor, added: torch.Tensor) -> "Moments":
        """The sums over some rows, [rows, hidden] each: products in float32, sums in float64."""
        entering, added = entering.float(), added.float()
        return cls(
            count=len(entering),
            x=entering.sum(0, dtype=torch.float64),
            y=added.sum(0, dtype=torch.float64),
            xx=(entering.T @ entering).double(),
            xy=(entering.T @ added).double(),
            yy=added.square().sum(dtype=torch.float64),
        )

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(*(getattr(self, name) + getattr(other, name) for name in vars(self)))

    def error(self, weight: torch.Tensor, offset: torch.Tensor) -> float:
        """Mean squared error of y by `x @ weight + offset`."""
        of_weight = ((weight.T @ self.xx).T * weight).sum() - 2 * (weight * self.xy).sum()
        of_offset = 2 * offset @ (self.x @ weight - self.y) + self.count * offset @ offset
        return float((self.yy + of_weight + of_offset) / self.count)


def fit(moments: Moments, held_back: Moments, rank: int = RANK) -> StandIn:
    """The map that is best on held-back text, of those of low rank by ridge regression.

    Centred; of the full map's predictions the `rank` directions with the largest variance.
    """
    rank = min(rank, len(moments.x))
    mean_x, mean_y = moments.x / moments.count, moments.y / moments.count
    of_x = moments.xx / moments.count - torch.outer(mean_x, mean_x)
    of_xy = moments.xy / moments.count - torch.outer(mean_x, mean_y)
    variances, axes = torch.linalg.eigh(of_x)
    along_axes = axes.T @ of_xy

    def full_map(ridge: float) -> torch.Tensor:
        scale = variances.clamp(min=0) + ridge * variances.mean()
        return axes @ (along_axes / scale[:, None])

    def error(weight: torch.Tensor) -> float:
        return held_back.error(weight, mean_y - mean_x @ weight)

    weight = min(map(full_map, RIDGES), key=error)
    predicted = weight.T @ of_xy
    directions = torch.linalg.eigh((predicted + predicted.T) / 2).eigenvectors[:, -rank:]
    down, up = weight @ directions, directions.T
    return StandIn(down, up, mean_y - mean_x @ down @ up)


def squared_errors(stand_in: StandIn, seen: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """By how much a map misses what a layer added, [tokens] float32.

    Args:
        seen, added: [tokens, hidden], x and y of `Moments`.
    """
    missed = -added.float()
    stand_in.fused(seen.device, torch.float32).add_to(missed, seen.float())
    return missed.square().sum(-1)


def with_error_direction(
    stand_in: StandIn, moments: Moments, seen_and_added: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> StandIn:
    """Give a map the direction along which the logarithm of its squared error grows.

    By ridge regression on the tokens that the map was fitted on.

    Args:
        moments: of these tokens.
        seen_and_added: x and y of some of them, and of the others, see `Moments`.
    """
    mean_x = moments.x / moments.count
    of_x = moments.xx / moments.count - torch.outer(mean_x, mean_x)
    with_errors, total = torch.zeros_like(moments.x), torch.zeros_like(moments.yy)
    for seen, added in seen_and_added:
        squared = squared_errors(stand_in, seen, added)
        errors = squared.clamp(min=torch.finfo(torch.float32).tiny).log()
        with_errors += (errors @ seen.float()).double()
        total += errors.sum(dtype=torch.float64)
    along = (with_errors - mean_x * total) / moments.count
    of_x.diagonal().add_(ERROR_RIDGE * of_x.diagonal().mean())
    return replace(stand_in, error_direction=torch.linalg.solve(of_x, along))


def fit_all(
    causal_lm: Any,
    texts: Sequence[Sequence[int]],
    held_back: Sequence[Sequence[int]],
    on_layer: Callable[[], None] = lambda: None,
) -> dict[int, StandIn]:
    """The stand-in of every layer, on the host, as a file keeps it.

    Args:
        causal_lm: see `Forward`.
        texts: token ids, each text from its first token, which is always computed and left out.
        held_back: other texts, by which the strength of the ridge is chosen.
    """
    decoder = Decoder(causal_lm.model)
    fitting, checking = start_walks(causal_lm, texts), start_walks(causal_lm, held_back)
    stand_ins = {}
    for index, layer in decoder.layers.items():
        moments = _through(fitting, index, layer.input_norm)
        stand_in = fit(moments, _through(checking, index, layer.input_norm))
        seen_and_added = (walk.seen_and_added(layer.input_norm) for walk in fitting)
        stand_in = with_error_direction(stand_in, moments, seen_and_added)
        stand_ins[index] = stand_in.to(torch.device("cpu"), STORED_DTYPE)
        on_layer()
    return stand_ins


@dataclass
class Walk:
    """Texts of one forward on their way through the dense model.

    Attributes:
        entering, residual: [T, hidden], before the last layer that they went through, and after.
        rows: [rows] int64, all but the texts' first.
    """

    forward: Forward
    entering: torch.Tensor
    residual: torch.Tensor
    rows: torch.Tensor

    def through(self, index: int) -> None:
        """Take the texts through a layer."""
        self.entering = self.residual
        self.residual = self.forward.through(self.entering.clone(), [index], {})

    def seen_and_added(self, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What that layer saw of the rows, by its norm, and what it added: [rows, hidden]."""
        normed, _ = add_and_norm(norm, self.entering.clone(), None)
        return normed[self.rows], (self.residual - self.entering)[self.rows]


def start_walks(causal_lm: Any, texts: Sequence[Sequence[int]]) -> list[Walk]:
    """Some texts at the first layer, as many together as make a good forward."""
    walks = []
    for indices in packed(map(len, texts), TOKENS_PER_FORWARD):
        forward = Forward(causal_lm, [texts[index] for index in indices], Method())
        rows = forward.texts.positions.nonzero()[:, 0]
        embedded = forward.embed()
        walks.append(Walk(forward, embedded, embedded, rows))
    return walks


def _through(walks: Sequence[Walk], index: int, norm: Any) -> Moments:
    """Take all texts through a layer, and sum what it sees of them and adds."""
    found = []
    for walk in walks:
        walk.through(index)
        found.append(Moments.of(*walk.seen_and_added(norm)))
    return sum(found[1:], found[0])
