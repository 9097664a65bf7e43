"""Which layers are selective: the options, resolved for one model."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from orthorank_vllm.options import MAX_RATIO, RATIO, LayerKeep, Option
from orthorank_vllm.profiles import Cost, MeasuredRule, Profile
from orthorank_vllm.selection.borders import Borders

# An expected loss above the one, or a share of found numbers below the other, is worth a warning.
MUCH_LOSS = 0.1
FEW_FOUND = 0.95
UNMEASURED = "the last layers, not measured"
# Of layers that are not measured, at least so many stay dense: the first form the sink, and what is
# looked up is found in the middle.
UNMEASURED_DENSE = 0.5

# What a ratio may be missed by.
FLOAT_NOISE = 1e-9

# Why a start does not measure, and what would help.
CALIBRATION_OFF = (
    "--orthorank-calibrate-seconds is 0",
    "measure them once with `orthorank calibrate`, or give --orthorank-profile, --orthorank-layers "
    "or some --orthorank-calibrate-seconds",
)


@dataclass(frozen=True)
class OrthoRankConfig:
    """What is run: options resolved for one model. Travels to every worker as a dict.

    Attributes:
        ratio_asked: None where layers were given without one, or the ratio is to be found.
        max_ratio: the most that a request may ask for, where that is not the same.
        max_loss: what the ratio is to be found by; None where it is given.
        min_prompt: tokens of a prompt below which nothing of it is skipped.
        aligned: whether prompts are to be cut at windows' ends alone; see `borders`.
        keep: of every layer, if given by hand.
        wants_stand_in: whether a profile is to bring what stands in for skipped updates.
        stand_in, stand_in_share: file of those maps, empty for none; see `Profile.share`.
        layers: in the profile's order; may be none. Those of the largest ratio.
        first_layers: how many of them, the first ones, a request has that asks for nothing; None:
            all.
        shadow: the share of prompts that are computed once more, densely, to compare.
        to_choose: the layers are still to be chosen when the weights are loaded.
        measured_on: fingerprint of the weights that `layers` were measured on; empty
            where nothing was measured, or it is not known.
        expected: what an answer loses, where that was measured, and the largest ratio that
            loses little, `advised`.
        remedy: what would get what was asked for, where this is less.
        maker: fingerprint of all that K and V depend on; empty where nobody else may load them.
    """

    ratio_asked: float | None
    window: int
    tail: int
    num_layers: int
    max_ratio: float | None = None
    max_loss: float | None = None
    min_prompt: int = 0
    aligned: bool = True
    keep: float | None = None
    wants_stand_in: bool = False
    stand_in: str = ""
    stand_in_share: float = 0.0
    layers: tuple[LayerKeep, ...] = ()
    first_layers: int | None = None
    source: str = ""
    to_choose: bool = False
    calibrate_seconds: float = 0.0
    attention: str = "auto"
    shadow: float = 0.0
    measured_on: str = ""
    expected: Cost | None = None
    advised: float | None = None
    remedy: str = ""
    maker: str = ""

    @property
    def num_default(self) -> int:
        """How many of the layers, the first ones, a request has that asks for nothing."""
        return len(self.layers) if self.first_layers is None else self.first_layers

    @property
    def default_layers(self) -> tuple[LayerKeep, ...]:
        return self.layers[: self.num_default]

    @property
    def ratio(self) -> float:
        """The ratio reached: the fraction of token-layer updates that prefill skips."""
        return self.ratio_with(self.num_default)

    def ratio_with(self, count: int) -> float:
        """The ratio that so many of the layers reach, the first ones."""
        return ratio_of(self.layers[:count], self.num_layers, self.stand_in_share)

    @property
    def most_asked(self) -> float | None:
        """The ratio that the layers are to reach; None where no number was given."""
        return self.ratio_asked if self.max_ratio is None else self.max_ratio

    @property
    def most_asked_option(self) -> Option:
        """The one that `most_asked` was given by."""
        return RATIO if self.max_ratio is None else MAX_RATIO

    @property
    def is_auto(self) -> bool:
        """Whether the ratio is to be found by the loss."""
        return self.max_loss is not None

    @property
    def most_ratio(self) -> float:
        """The largest ratio that a request may ask for.

        Any, where the server's own is to be found: it gets all layers that were.
        """
        if self.most_asked is not None:
            return self.most_asked
        return 1.0 if self.is_auto else ratio_of(self.layers, self.num_layers)

    @cached_property
    def _reached(self) -> list[float]:
        counts = range(len(self.layers) + 1)
        return [ratio_of(self.layers[:count], self.num_layers) + FLOAT_NOISE for count in counts]

    def num_for(self, ratio: float) -> int:
        """How many of the layers, the first ones, make a ratio; all where they are too few."""
        return min(bisect_left(self._reached, ratio), len(self.layers))

    @property
    def rule(self) -> MeasuredRule:
        """What a profile must have been measured with to tell what is lost."""
        return MeasuredRule(self.window, self.tail, self.wants_stand_in)

    @cached_property
    def keeps(self) -> tuple[float, ...]:
        """The keeps of the layers, in their order."""
        return tuple(keep for _, keep in self.layers)

    @property
    def borders(self) -> Borders | None:
        """Where prompts may be cut; None where nothing is kept to.

        Where no layer chooses, a prompt's tail is all that one cut can differ in from another. The
        whole prompt as one window has no end that a chunk could end at.
        """
        window = self.window if any(self.keeps) else 1
        return Borders(window, self.tail) if self.aligned and self.keeps and window else None

    @property
    def is_aligned(self) -> bool:
        """Whether the same tokens of a prompt are computed under any load."""
        return not self.keeps or self.borders is not None

    @property
    def measured(self) -> bool:
        """Whether the layers were measured, or given by hand, and are all that was asked for."""
        return not self.remedy

    def as_dict(self) -> dict[str, Any]:
        """The configuration in JSON types: vLLM hashes its additional_config by `json.dumps`."""
        return {**asdict(self), "layers": [list(layer) for layer in self.layers]}

    @classmethod
    def of_engine(cls, additional_config: Any) -> "OrthoRankConfig | None":
        """That of an engine that is configured; None where OrthoRank is off.

        Args:
            additional_config: vLLM's; any type, as vLLM leaves that open.
        """
        is_known = isinstance(additional_config, dict) and additional_config.get("orthorank")
        return cls.from_dict(additional_config["orthorank"]) if is_known else None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "OrthoRankConfig":
        expected = values["expected"]
        return cls(
            **{
                **values,
                "layers": tuple(LayerKeep(*layer) for layer in values["layers"]),
                "expected": None if expected is None else Cost(**expected),
            }
        )

    def with_layers(self, layers: Sequence[LayerKeep], source: str) -> "OrthoRankConfig":
        """A copy whose layers are chosen: those of the largest ratio."""
        chosen = replace(
            self,
            layers=tuple(layers),
            first_layers=None,
            source=source,
            to_choose=False,
            calibrate_seconds=0.0,
        )
        if self.max_ratio is None or self.ratio_asked is None:
            return chosen
        return replace(chosen, first_layers=chosen.num_for(self.ratio_asked))

    def entries_needed(self, profile: Profile) -> int | None:
        """How many of a profile's entries make the most that was asked for.

        None if it has too few, or, where the loss decides, no figures of what is run.
        """
        if self.is_auto:
            within = self.within_loss(profile)
            if within is None or self.max_ratio is None:
                return within
        assert self.most_asked is not None
        counts = range(1, len(profile.entries) + 1)
        enough = (count for count in counts if self.reached(profile, count) >= self.most_asked)
        return next(enough, None)

    def within_loss(self, profile: Profile) -> int | None:
        """How many of a profile's entries lose no more than is allowed, by figures of what is run.

        None if it has none.
        """
        counts = range(1, len(profile.entries) + 1)
        assert self.max_loss is not None
        costs = {count: cost for count in counts if (cost := _expected(profile, count)) is not None}
        if not costs or not self._is_of(profile):
            return None
        within = (count for count, cost in costs.items() if cost.worst <= self.max_loss)
        return max(within, default=0)

    def reached(self, profile: Profile, count: int) -> float:
        """The share of updates that a profile's first entries skip, and float noise above it.

        What is asked for: the stand-ins' own work counts in the ratio that is told.
        """
        return ratio_of(self._of(profile, count), self.num_layers) + FLOAT_NOISE

    def with_profile(self, profile: Profile, source: str = "") -> "OrthoRankConfig":
        """A copy with the first entries of a profile, all of them where they are too few.

        Args:
            source: for the start-up line; by itself the profile's name.
        """
        source = source or f"profile {profile.name}"
        within = self.within_loss(profile) if self.is_auto else None
        count = self.entries_needed(profile)
        if count is None:
            count = 0 if self.is_auto and within is None else len(profile.entries)
        if not count:
            return self.dense(
                f"by {source} no layer can be selective at a loss of {self.max_loss}",
                "allow more with --orthorank-max-loss, or give --orthorank-ratio a number",
            )
        chosen = self._with_stand_in(profile).with_layers(self._of(profile, count), source)
        chosen = replace(chosen, measured_on=profile.weights or "")
        if within is not None:
            chosen = replace(chosen, first_layers=min(within, count))
        if not self._is_of(profile):
            return chosen
        expected = _expected(profile, chosen.num_default)
        return replace(chosen, expected=expected, advised=_advised(profile))

    def unmeasured(self, reason: str, remedy: str) -> "OrthoRankConfig":
        """A copy with layers that nothing was measured for: the last ones.

        Args:
            reason, remedy: why that is so, and what would help.

        Raises:
            OptionError: there are too few that may be guessed.
        """
        if self.is_auto or self.most_asked is None:
            return self.dense(reason, remedy)
        keep = 0.0 if self.keep is None else self.keep
        most = int(self.num_layers * (1 - UNMEASURED_DENSE))
        count = math.ceil(self.most_asked * self.num_layers / (1 - keep) - 1e-9)
        if count > most:
            raise self.most_asked_option.rejected(
                self.most_asked,
                f"it needs {count} selective layers, and of layers that are not measured "
                f"({reason}) only the last {most} of this model's {self.num_layers} may be; "
                f"{remedy}",
            )
        layers = [LayerKeep(self.num_layers - 1 - index, keep) for index in range(count)]
        return replace(self.with_layers(layers, f"{UNMEASURED}: {reason}"), remedy=remedy)

    def dense(self, reason: str, remedy: str) -> "OrthoRankConfig":
        """A copy without selective layers: stock prefill.

        Args:
            reason, remedy: why that is so, and what would help.
        """
        return replace(self.with_layers((), f"nothing: {reason}"), remedy=remedy)

    def _of(self, profile: Profile, count: int) -> list[LayerKeep]:
        return [
            entry.layer_keep if self.keep is None else LayerKeep(entry.layer, self.keep)
            for entry in profile.entries[:count]
        ]

    def _with_stand_in(self, profile: Profile) -> "OrthoRankConfig":
        """A copy with the profile's stand-ins, where none were given by hand."""
        if self.stand_in or not self.wants_stand_in or profile.stand_in_path is None:
            return self
        path = str(profile.stand_in_path)
        return replace(self, stand_in=path, stand_in_share=profile.share)

    def _is_of(self, profile: Profile) -> bool:
        """Whether the profile's costs are of what is run."""
        rule = (profile.window, profile.tail) == (self.window, self.tail)
        stand_in = self._with_stand_in(profile).stand_in
        is_same_stand_in = stand_in == str(profile.stand_in_path or "")
        return rule and is_same_stand_in and self.keep is None


def ratio_of(layers: Sequence[LayerKeep], num_layers: int, stand_in_share: float = 0.0) -> float:
    """The ratio that these layers reach.

    Args:
        stand_in_share: see `Profile.share`.
    """
    return sum(1 - keep for _, keep in layers) * (1 - stand_in_share) / num_layers


def _expected(profile: Profile, count: int) -> Cost | None:
    if not count:
        return None
    entry = profile.entries[count - 1]
    return entry.held_back or entry.cost


def _advised(profile: Profile) -> float | None:
    """The largest of a profile's ratios at which an answer loses little."""
    little = [
        ratio
        for count, ratio in enumerate(profile.ratios, start=1)
        if (cost := _expected(profile, count)) is not None
        and cost.worst <= MUCH_LOSS
        and (cost.found is None or cost.found >= FEW_FOUND)
    ]
    return max(little, default=None)
