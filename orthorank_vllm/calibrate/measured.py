"""Losses of choices of layers on some samples, kept as they are measured."""

import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orthorank_vllm.calibrate.kinds import Sample
from orthorank_vllm.offline.served import AnswerLoss
from orthorank_vllm.options import LayerKeep
from orthorank_vllm.profiles import Cost

# Digits after the point of what is kept: far finer than what tells two choices apart, and too
# coarse for the order of a sum, which differs with the number of threads, to show.
DIGITS = 6

Layers = tuple[LayerKeep, ...]


class Trial(Protocol):
    """A loaded model on some texts."""

    @property
    def dense(self) -> Sequence[AnswerLoss]:
        """Each text's loss in the dense model."""

    def start_step(self, chosen: Mapping[int, float]) -> None:
        """Begin anew, with these layers chosen, each with its keep."""

    def losses_with(self, more: Mapping[int, float]) -> Sequence[AnswerLoss]:
        """Each text's loss with more layers chosen; their lowest in ascending order."""


@dataclass(frozen=True)
class Losses:
    """What one choice of layers costs each sample.

    Attributes:
        kl: [samples] nats per answer token.
        found: [samples] numbers found, of those that the dense model finds.
    """

    kl: tuple[float, ...]
    found: tuple[int, ...]


@dataclass
class Measured:
    """The losses of choices on the same samples, each measured once.

    Attributes:
        open_trial: loads the samples; called when something has to be measured first.
        before_trial: called before each measurement; may raise, and ends it so.
        known: what was measured so far, by `key_of` the layers.
    """

    samples: Sequence[Sample]
    open_trial: Callable[[], Trial]
    before_trial: Callable[[], None] = lambda: None
    known: dict[str, Losses] = field(default_factory=dict)
    _trial: Trial | None = None
    _dense: "tuple[float, tuple[int, ...]] | None" = None

    @property
    def trial(self) -> Trial:
        if self._trial is None:
            self.before_trial()
            self._trial = self.open_trial()
        return self._trial

    @property
    def weights(self) -> list[float]:
        """Each sample's share of the mean, in which every kind of text counts alike."""
        counts = dict.fromkeys(self.kinds, 0)
        for sample in self.samples:
            counts[sample.kind] += 1
        return [1 / (len(counts) * counts[sample.kind]) for sample in self.samples]

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(sample.kind for sample in self.samples))

    def of(self, chosen: Layers, candidates: Iterable[LayerKeep]) -> dict[LayerKeep, Losses]:
        """The losses of `chosen` with each of the candidates beside."""
        wanted = sorted(set(candidates))
        missing = [each for each in wanted if key_of((*chosen, each)) not in self.known]
        if missing:
            self.trial.start_step(dict(chosen))
        for each in missing:
            self.before_trial()
            self.known[key_of((*chosen, each))] = self._measure((each,))
        return {each: self.known[key_of((*chosen, each))] for each in wanted}

    def of_all(self, chosen: Layers) -> Losses:
        """The losses of `chosen`."""
        if not chosen:
            return Losses((0.0,) * len(self.samples), self.dense[1])
        key = key_of(chosen)
        if key not in self.known:
            self.before_trial()
            self.trial.start_step(dict(chosen))
            self.known[key] = self._measure(())
        return self.known[key]

    @property
    def dense(self) -> tuple[float, tuple[int, ...]]:
        """What the dense model does: nats per answer token, and [samples] numbers found."""
        if self._dense is None:
            losses = self.trial.dense
            loss = sum(loss.dense_nll for loss in losses) / sum(loss.tokens for loss in losses)
            self._dense = round(loss, DIGITS), tuple(loss.dense_found for loss in losses)
        return self._dense

    def mean(self, losses: Losses) -> float:
        """Nats per answer token, every kind of text alike."""
        return self.weighted(losses.kl)

    def weighted(self, of_samples: Sequence[float]) -> float:
        """The mean of something of each sample, every kind of text alike."""
        return math.fsum(w * value for w, value in zip(self.weights, of_samples, strict=True))

    def by_kind(self, losses: Losses) -> dict[str, float]:
        """Nats per answer token of each kind."""
        return {
            kind: statistics.fmean(
                kl
                for kl, sample in zip(losses.kl, self.samples, strict=True)
                if sample.kind == kind
            )
            for kind in self.kinds
        }

    def standard_error(self, differences: Sequence[float]) -> float:
        """Error of the samples' mean difference, every kind of text alike; 0 if it is unknown."""
        variance = 0.0
        for kind in self.kinds:
            of_kind = [
                difference
                for difference, sample in zip(differences, self.samples, strict=True)
                if sample.kind == kind
            ]
            if len(of_kind) > 1:
                variance += statistics.variance(of_kind) / len(of_kind)
        return math.sqrt(variance) / len(self.kinds)

    def cost(self, losses: Losses) -> Cost:
        """The losses by kind, and the share of numbers found, for a profile."""
        dense = sum(self.dense[1])
        loss = {kind: round(value, 4) for kind, value in self.by_kind(losses).items()}
        return Cost(loss, round(sum(losses.found) / dense, 4) if dense else None)

    def as_dict(self) -> dict[str, Any]:
        """What is known, in JSON types; `restore` takes it back."""
        known = {key: [losses.kl, losses.found] for key, losses in self.known.items()}
        return {"samples": self._samples_sha256, "dense": self._dense, "known": known}

    def restore(self, content: Mapping[str, Any]) -> None:
        """Take what was measured, unless on other samples: the tokenizer was another, say."""
        if content.get("samples") != self._samples_sha256:
            return
        if content["dense"] is not None:
            loss, found = content["dense"]
            self._dense = float(loss), tuple(found)
        self.known = {
            key: Losses(tuple(kl), tuple(found)) for key, (kl, found) in content["known"].items()
        }

    @property
    def _samples_sha256(self) -> str:
        return hashlib.sha256(repr(list(self.samples)).encode()).hexdigest()

    def _measure(self, more: Layers) -> Losses:
        losses = self.trial.losses_with(dict(more))
        return Losses(
            tuple(_rounded(loss.kl / loss.tokens) for loss in losses),
            tuple(loss.found for loss in losses),
        )


def key_of(layers: Iterable[LayerKeep]) -> str:
    """A name of a choice of layers, whatever their order."""
    return ",".join(map(str, sorted(layers)))


def _rounded(number: float) -> float:
    # A choice that breaks the model is the worst of all, not an error.
    return round(number, DIGITS) if math.isfinite(number) else 1e9
