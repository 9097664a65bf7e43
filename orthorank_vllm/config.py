"""Which layers are selective: the options, resolved for one model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from orthorank_vllm.options import (
    AUTO,
    DEFAULT_MAX_LOSS,
    LAYERS,
    PROFILE,
    RATIO,
    LayerKeep,
    Options,
)
from orthorank_vllm.profiles import (
    Cost,
    Profile,
    ProfileError,
    kept_profiles,
    read_profile_of,
    shipped_profile,
)

# An expected loss above the one, or a share of found numbers below the other, is worth a warning.
MUCH_LOSS = 0.1
FEW_FOUND = 0.95
UNMEASURED = "the last layers, not measured"
# Of layers that are not measured, at least so many stay dense: the first form the sink, and what is
# looked up is found in the middle.
UNMEASURED_DENSE = 0.5

# Why a start does not measure, and what would help.
NO_WEIGHTS = (
    "this load format loads no weights",
    "give --orthorank-profile, a file that `orthorank calibrate` made on the weights that are to "
    "come, or --orthorank-layers",
)
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
        max_loss: what the ratio is to be found by; None where it is given.
        keep: of every layer, if given by hand.
        layers: in the profile's order; may be none.
        to_choose: the layers are still to be chosen when the weights are loaded.
        measured_on: fingerprint of the weights that `layers` were measured on; empty
            where nothing was measured, or it is not known.
        expected: what an answer loses, where that was measured, and the largest ratio that
            loses little, `advised`.
        remedy: what would get what was asked for, where this is less.
    """

    ratio_asked: float | None
    window: int
    tail: int
    num_layers: int
    max_loss: float | None = None
    keep: float | None = None
    layers: tuple[LayerKeep, ...] = ()
    source: str = ""
    to_choose: bool = False
    calibrate_seconds: float = 0.0
    attention: str = "auto"
    measured_on: str = ""
    expected: Cost | None = None
    advised: float | None = None
    remedy: str = ""

    @property
    def ratio(self) -> float:
        """The ratio reached: the fraction of token-layer updates that prefill skips."""
        return ratio_of(self.layers, self.num_layers)

    @property
    def keeps(self) -> tuple[float, ...]:
        """The keeps of the layers, each once."""
        return tuple(dict.fromkeys(keep for _, keep in self.layers if keep is not None))

    @property
    def measured(self) -> bool:
        """Whether the layers were measured, or given by hand, and are all that was asked for."""
        return not self.remedy

    def as_dict(self) -> dict[str, Any]:
        """The configuration in JSON types: vLLM hashes its additional_config by `json.dumps`."""
        return {**asdict(self), "layers": [list(layer) for layer in self.layers]}

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
        """A copy whose layers are chosen."""
        return replace(
            self, layers=tuple(layers), source=source, to_choose=False, calibrate_seconds=0.0
        )

    def entries_needed(self, profile: Profile) -> int | None:
        """How many of a profile's entries make the ratio; None if it has too few."""
        if self.ratio_asked is None:
            return len(profile.entries)
        for count in range(1, len(profile.entries) + 1):
            if ratio_of(self._of(profile, count), self.num_layers) > self.ratio_asked - 1e-9:
                return count
        return None

    def with_profile(self, profile: Profile, source: str = "") -> "OrthoRankConfig":
        """A copy with the first entries of a profile, all of them where they are too few.

        Args:
            source: for the start-up line; by itself the profile's name.
        """
        source = source or f"profile {profile.name}"
        if self.ratio_asked is None:
            count = self._entries_within(profile)
        else:
            count = self.entries_needed(profile) or len(profile.entries)
        chosen = self.with_layers(self._of(profile, count), source)
        chosen = replace(chosen, measured_on=profile.weights or "")
        if not self._is_of(profile):
            return chosen
        return replace(chosen, expected=_expected(profile, count), advised=_advised(profile))

    def unmeasured(self, reason: str, remedy: str) -> "OrthoRankConfig":
        """A copy with layers that nothing was measured for: the last ones.

        Args:
            reason, remedy: why that is so, and what would help.

        Raises:
            OptionError: there are too few that may be guessed.
        """
        if self.ratio_asked is None:
            return self.dense(reason, remedy)
        keep = 0.0 if self.keep is None else self.keep
        most = int(self.num_layers * (1 - UNMEASURED_DENSE))
        count = -int(-(self.ratio_asked * self.num_layers / (1 - keep) - 1e-9) // 1)
        if count > most:
            raise RATIO.rejected(
                self.ratio_asked,
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

    def describe(self) -> str:
        """The start-up line."""
        asked = ""
        if self.max_loss is not None:
            asked = f" (auto: at most {self.max_loss:.3g} nats lost)"
        elif self.ratio_asked is not None:
            asked = f" (asked for {self.ratio_asked:.3g})"
        window = f"window {self.window}" if self.window else "window: whole prompt"
        expected = "" if self.expected is None else f", expected loss {describe(self.expected)}"
        return (
            f"OrthoRank is active: ratio {self.ratio:.3f}{asked}, {window}, tail {self.tail}, "
            f"{len(self.layers)} of {self.num_layers} layers selective "
            f"[{','.join(map(str, self.layers))}], chosen by {self.source}{expected}"
        )

    def warning(self) -> str:
        """What these layers cost, if that is much, or that nobody knows; else empty."""
        if not self.layers:
            return ""
        if self.expected is None:
            return (
                "OrthoRank does not know what answers lose with these layers: measure it with "
                "`orthorank evaluate`, look-ups above all, before you serve them."
            )
        found = 1.0 if self.expected.found is None else self.expected.found
        if self.max_loss is not None or (self.expected.worst <= MUCH_LOSS and found >= FEW_FOUND):
            return ""
        advice = (
            "give --orthorank-ratio 0"
            if self.advised is None
            else f"--orthorank-ratio {self.advised:.3g} keeps them"
        )
        return (
            f"OrthoRank expects answers to lose {describe(self.expected)} at this ratio, more than "
            f"{MUCH_LOSS:g} nats on the worst kind of text or more than {1 - FEW_FOUND:.0%} of "
            f"the look-ups: {advice}."
        )

    def _of(self, profile: Profile, count: int) -> list[LayerKeep]:
        return [
            entry.layer_keep if self.keep is None else LayerKeep(entry.layer, self.keep)
            for entry in profile.entries[:count]
        ]

    def _is_of(self, profile: Profile) -> bool:
        """Whether the profile's costs are of what is run."""
        rule = (profile.window, profile.tail) == (self.window, self.tail)
        return rule and self.keep is None

    def _entries_within(self, profile: Profile) -> int:
        assert self.max_loss is not None
        within = [
            count
            for count in range(1, len(profile.entries) + 1)
            if (cost := _expected(profile, count)) is not None and cost.worst <= self.max_loss
        ]
        return max(within, default=0)


def ratio_of(layers: Sequence[LayerKeep], num_layers: int) -> float:
    """The ratio that these layers reach."""
    return sum(1 - (keep or 0.0) for _, keep in layers) / num_layers


def describe(cost: Cost) -> str:
    """A cost in one line: nats per answer token by kind of text, and the numbers found."""
    losses = ", ".join(f"{kind} {loss:.3f}" for kind, loss in cost.loss.items())
    found = "" if cost.found is None else f"; {cost.found:.0%} of numbers found"
    return f"{losses} nats a token{found}"


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


def resolve(
    options: Options, model: Mapping[str, Any], cache_root: str, has_weights: bool = True
) -> OrthoRankConfig:
    """Choose the selective layers of one model, or leave that to its start-up.

    What was measured on this machine is known by the weights too, so where there is
    such a profile of this configuration, the choice is left until they are loaded.

    Args:
        options: active options.
        model: see `profiles.model_identity`.
        cache_root: vLLM's, where calibrated profiles are kept.
        has_weights: whether the load format loads any: on random ones nothing is
            measured, and none are known to be those of a profile that was kept.

    Raises:
        OptionError: the options do not fit this model.
    """
    num_layers = int(model["num_hidden_layers"])
    is_auto = options.ratio == AUTO
    max_loss = DEFAULT_MAX_LOSS if options.max_loss is None else options.max_loss
    config = OrthoRankConfig(
        ratio_asked=None if is_auto else options.ratio,
        max_loss=max_loss if is_auto else None,
        keep=options.keep,
        window=options.window,
        tail=options.tail,
        num_layers=num_layers,
        attention=options.attention,
    )
    if options.layers is not None:
        _check_layers(options, num_layers)
        return config.with_layers(options.layer_keeps, LAYERS.flag)
    if options.profile is not None:
        return config.with_profile(_given_profile(options.profile, model, config))
    to_choose = replace(config, to_choose=True)
    if has_weights:
        to_choose = replace(to_choose, calibrate_seconds=options.calibrate_seconds)
        if kept_profiles(cache_root, model["config_sha256"], options.window, options.tail):
            return to_choose
    shipped = shipped_profile(model)
    if shipped is not None and config.entries_needed(shipped) is not None:
        return config.with_profile(shipped)
    if not has_weights:
        return config.unmeasured(*NO_WEIGHTS)
    if options.calibrate_seconds:
        return to_choose
    if shipped is not None:
        raise RATIO.rejected(options.ratio, _reaches_too_little(shipped, config))
    return config.unmeasured(*CALIBRATION_OFF)


def _check_layers(options: Options, num_layers: int) -> None:
    layers = options.layer_keeps
    given = ",".join(map(str, options.layers or ()))
    if max(layer for layer, _ in layers) >= num_layers:
        raise LAYERS.rejected(
            given,
            f"this model has layers 0 to {num_layers - 1} (in a YAML list a layer with its keep "
            'has quotes, "29:0")',
        )
    if options.ratio is not None:
        reached = ratio_of(layers, num_layers)
        one_layer = max(1 - (keep or 0.0) for _, keep in layers) / num_layers
        if abs(reached - options.ratio) > one_layer + 1e-9:
            raise LAYERS.rejected(
                given,
                f"these {len(layers)} layers reach ratio {reached:.3f}, "
                f"which does not agree with --orthorank-ratio {options.ratio:.4g}",
            )


def _given_profile(path: str, model: Mapping[str, Any], config: OrthoRankConfig) -> Profile:
    try:
        profile = read_profile_of(model, path)
    except ProfileError as error:
        raise PROFILE.rejected(path, str(error)) from None
    if config.entries_needed(profile) is None:
        raise PROFILE.rejected(path, _reaches_too_little(profile, config))
    if config.max_loss is not None and not any(e.cost or e.held_back for e in profile.entries):
        raise PROFILE.rejected(path, "--orthorank-ratio auto goes by its losses, and it has none")
    return profile


def _reaches_too_little(profile: Profile, config: OrthoRankConfig) -> str:
    most = ratio_of(config._of(profile, len(profile.entries)), config.num_layers)
    return (
        f"ratio {config.ratio_asked:.4g} is more than the {most:.4g} that the "
        f"{len(profile.entries)} layers of profile {profile.name} reach"
    )
