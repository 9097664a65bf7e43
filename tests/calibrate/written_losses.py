"""Losses that are written down: a search on them, and its trials, without a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from orthorank_vllm.calibrate.kinds import Sample
from orthorank_vllm.calibrate.measured import Measured
from orthorank_vllm.calibrate.search import Search
from orthorank_vllm.offline.served import AnswerLoss
from orthorank_vllm.profiles import Entry

# Nats per answer token of a choice of layers with their keeps: of all samples, or of each kind.
Loss = Callable[[Mapping[int, float]], "float | Mapping[str, float]"]
DENSE_LOSS = 3.0


# In which nothing has to be found in the prompt.
TELLING = ("prose", "chat")


def samples_of(kinds: Sequence[str] = TELLING, each: int = 2) -> list[Sample]:
    """Some of each kind, of one prompt token and one answer token."""
    return [
        Sample(kind, (number, number), 1, ((1, 2),)) for kind in kinds for number in range(each)
    ]


def layers_cost(
    costs: Sequence[float],
    pairs: Mapping[tuple[int, int], float] | None = None,
    at_keeps: Mapping[tuple[int, float], float] | None = None,
) -> Callable[[Mapping[int, float]], float]:
    """A loss that is the sum of what layers cost, and of what pairs cost together.

    Args:
        costs: of each layer at keep 0; at another keep less, and more for what it saves.
        at_keeps: of a layer at a keep, instead.
    """

    def loss(chosen: Mapping[int, float]) -> float:
        alone = sum(
            (at_keeps or {}).get((layer, keep), costs[layer] * (1 - keep**2))
            for layer, keep in chosen.items()
        )
        return alone + sum(
            cost * (1 - chosen[a]) * (1 - chosen[b])
            for (a, b), cost in (pairs or {}).items()
            if a in chosen and b in chosen
        )

    return loss


@dataclass
class WrittenTrial:
    """A `Trial` whose losses are written down.

    Attributes:
        noise: of each sample, for each layer that is chosen.
        tried: the sets measured, in order.
    """

    samples: Sequence[Sample]
    loss: Loss
    noise: Sequence[Mapping[int, float]] = ()
    dense_loss: float = DENSE_LOSS
    tried: list[dict[int, float]] = field(default_factory=list)
    _chosen: dict[int, float] = field(default_factory=dict)
    _lowest: int = -1

    @property
    def dense(self) -> list[AnswerLoss]:
        return [
            AnswerLoss(tokens=1, dense_nll=self.dense_loss, spans=1, dense_found=1)
            for _ in self.samples
        ]

    def start_step(self, chosen: Mapping[int, float]) -> None:
        self._chosen = dict(chosen)
        self._lowest = -1

    def losses_with(self, more: Mapping[int, float]) -> list[AnswerLoss]:
        assert min(more, default=self._lowest) >= self._lowest, "not in ascending order"
        self._lowest = min(more, default=self._lowest)
        chosen = self._chosen | dict(more)
        self.tried.append(chosen)
        loss = self.loss(chosen)
        return [
            AnswerLoss(
                tokens=1,
                kl=(loss[sample.kind] if isinstance(loss, Mapping) else loss)
                + sum(noise.get(layer, 0.0) for layer in chosen),
                found=1,
            )
            for sample, noise in zip(
                self.samples, self.noise or [{}] * len(self.samples), strict=True
            )
        ]


class WrittenSearch:
    """A search on losses that are written down.

    Attributes:
        trials: by what they are for: "scout", "here" and "held_back".
        search: not yet run.
    """

    def __init__(
        self,
        num_layers: int,
        here: Loss,
        held_back: Loss | None = None,
        scout: Loss | None = None,
        noise: Sequence[Mapping[int, float]] = (),
        dense_loss: float = DENSE_LOSS,
        tries_keeps: bool = True,
        kinds: Sequence[str] = TELLING,
        before_trial: Callable[[], None] = lambda: None,
        known: "WrittenSearch | None" = None,
    ) -> None:
        """
        Args:
            held_back, scout: None: as `here`.
            noise: of each sample here, for each layer that is chosen.
            known: a search whose measurements this one goes on from.
        """
        samples = samples_of(kinds)
        self.trials = {
            "scout": WrittenTrial(samples, scout or here),
            "here": WrittenTrial(samples, here, noise, dense_loss),
            "held_back": WrittenTrial(samples, held_back or here),
        }
        self.measured = {
            name: Measured(samples, lambda trial=trial: trial, before_trial)  # type: ignore[misc]
            for name, trial in self.trials.items()
        }
        if known is not None:
            for name, each in known.measured.items():
                self.measured[name].restore(each.as_dict())
        self.search = Search(
            scout=self.measured["scout"],
            here=self.measured["here"],
            held_back=self.measured["held_back"],
            num_layers=num_layers,
            tries_keeps=tries_keeps,
        )

    def run(self, max_ratio: float = 1.0, chance: float = 10.0) -> list[Entry]:
        """What the search finds up to a ratio."""
        self.search.run(max_ratio, chance)
        return self.search.entries

    @property
    def tried(self) -> list[tuple[str, dict[int, float]]]:
        """All sets measured, with what they were measured for."""
        return [(name, chosen) for name, trial in self.trials.items() for chosen in trial.tried]


def layers_of(entries: Sequence[Entry]) -> list[int]:
    return [entry.layer for entry in entries]


def alternately(much: float) -> list[float]:
    """Of each sample, nothing in the mean: the two of each kind differ."""
    return [much if index % 2 else -much for index in range(len(samples_of()))]
