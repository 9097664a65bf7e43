"""Which layers are selective: the options, resolved for one model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from orthorank_vllm.options import LAYERS, PROFILE, RATIO, OptionError, Options
from orthorank_vllm.profiles import (
    Profile,
    ProfileError,
    kept_profiles,
    read_profile_of,
    shipped_profile,
)

# Without a measured order, the first layers (which form the sink) and the last
# ones (which form the prediction) stay dense.
UNMEASURED_DENSE_HEAD = 3
UNMEASURED_DENSE_TAIL = 2
# Of look-ups: with fewer found a start warns.
FEW_LOOKUPS = 0.9
EVEN_SPACING = "even spacing, not measured"

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
        to_choose: layers that are still to be chosen when the weights are loaded; 0
            where `layers` is final.
        measured_on: fingerprint of the weights that `layers` were measured on; empty
            where nothing was measured, or it is not known.
        lookups: share of the numbers in a list in its prompt that is found, of those that the
            dense model finds; None where that was not measured.
        remedy: what would get measured layers, where these are guessed.
    """

    ratio_asked: float | None
    keep: float
    window: int
    layers: tuple[int, ...]
    num_layers: int
    source: str
    to_choose: int = 0
    calibrate_seconds: float = 0.0
    attention: str = "auto"
    measured_on: str = ""
    lookups: float | None = None
    remedy: str = ""

    @property
    def ratio(self) -> float:
        """The ratio reached: the fraction of token-layer updates that prefill skips."""
        return len(self.layers) * (1 - self.keep) / self.num_layers

    @property
    def measured(self) -> bool:
        """Whether the layers were measured, or given by hand."""
        return not self.remedy

    def as_dict(self) -> dict[str, Any]:
        """The configuration in JSON types: vLLM hashes its additional_config by `json.dumps`."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "OrthoRankConfig":
        return cls(**{**values, "layers": tuple(values["layers"])})

    def with_layers(self, layers: Sequence[int], source: str) -> "OrthoRankConfig":
        """A copy whose layers are chosen."""
        layers = tuple(sorted(layers))
        return replace(self, layers=layers, source=source, to_choose=0, calibrate_seconds=0.0)

    def with_profile(self, profile: Profile) -> "OrthoRankConfig":
        """A copy with the first layers of a profile, as many as are to be chosen."""
        chosen = self.with_layers(profile.order[: self.to_choose], profile.describe(self.keep))
        return replace(
            chosen,
            measured_on=profile.weights or "",
            lookups=profile.lookups_with(self.to_choose, self.keep, self.window),
        )

    def evenly_spaced(self, reason: str, remedy: str) -> "OrthoRankConfig":
        """A copy with layers that nothing was measured for.

        Args:
            reason, remedy: why that is so, and what would help.

        Raises:
            OptionError: there are too few that may be guessed.
        """
        assert self.ratio_asked is not None
        candidates = self.num_layers - UNMEASURED_DENSE_HEAD - UNMEASURED_DENSE_TAIL
        if self.to_choose > candidates:
            raise RATIO.rejected(
                self.ratio_asked,
                f"it needs {self.to_choose} selective layers, and of layers that are not measured "
                f"({reason}) only {max(candidates, 0)} of this model's {self.num_layers} may be; "
                f"{remedy}",
            )
        layers = [
            UNMEASURED_DENSE_HEAD + (2 * i + 1) * candidates // (2 * self.to_choose)
            for i in range(self.to_choose)
        ]
        chosen = self.with_layers(layers, f"{EVEN_SPACING}: {reason}")
        return replace(chosen, remedy=remedy)

    def describe(self) -> str:
        """The start-up line."""
        asked = "" if self.ratio_asked is None else f" (asked for {self.ratio_asked:.3g})"
        window = f"window {self.window}" if self.window else "window: whole prompt"
        return (
            f"OrthoRank is active: ratio {self.ratio:.3f}{asked}, keep {self.keep:.3f}, {window}, "
            f"{len(self.layers)} of {self.num_layers} layers selective "
            f"[{','.join(map(str, self.layers))}], chosen by {self.source}"
        )

    def describe_lookups(self) -> str:
        """What the layers do to finding things in a prompt; empty where next to nothing is lost."""
        if self.lookups is None:
            return (
                "OrthoRank has not measured whether the model still finds things in its prompt "
                "with these layers: look-ups can fail where prose looks well. Try your own before "
                "you serve it."
            )
        if self.lookups < FEW_LOOKUPS:
            return (
                f"With these layers the model finds {self.lookups:.0%} of the numbers in a list in "
                "its prompt that it finds without OrthoRank: do not serve prompts in which things "
                "must be found at this ratio."
            )
        return ""


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
    config = OrthoRankConfig(
        ratio_asked=options.ratio,
        keep=options.keep,
        window=options.window,
        layers=(),
        num_layers=num_layers,
        source="",
        attention=options.attention,
    )
    if options.layers is not None:
        _check_layers(options, num_layers)
        return config.with_layers(options.layers, "--orthorank-layers")
    assert options.ratio is not None
    count = selective_count(RATIO.flag, options.ratio, options.keep, num_layers)
    config = replace(config, to_choose=count)
    if options.profile is not None:
        return config.with_profile(_given_profile(options.profile, model, options.ratio, count))
    if has_weights:
        config = replace(config, calibrate_seconds=options.calibrate_seconds)
        if kept_profiles(cache_root, model["config_sha256"], options.keep, options.window):
            return config
    shipped = shipped_profile(model)
    if shipped is not None and count <= len(shipped.order):
        return config.with_profile(shipped)
    if not has_weights:
        return config.evenly_spaced(*NO_WEIGHTS)
    if options.calibrate_seconds:
        return config
    if shipped is not None:
        raise RATIO.rejected(options.ratio, _ranks_too_few(shipped, options.ratio, count))
    return config.evenly_spaced(*CALIBRATION_OFF)


def selective_count(option: str, ratio: float, keep: float, num_layers: int) -> int:
    """`ratio x layers / (1 - keep)`, rounded half up.

    Raises:
        OptionError: it is none, or more than there are; names `option`.
    """
    # The small term keeps a half a half: 0.3 x 30 / (2/3) is 13.5, not 13.49999.
    count = math.floor(ratio * num_layers / (1 - keep) + 0.5 + 1e-9)
    if not 0 < count <= num_layers:
        raise OptionError(
            option,
            ratio,
            f"it makes {count} of this model's {num_layers} layers selective; "
            f"give {(1 - keep) / num_layers:.4g} to {1 - keep:.4g}",
        )
    return count


def _check_layers(options: Options, num_layers: int) -> None:
    assert options.layers is not None
    given = ",".join(map(str, options.layers))
    if max(options.layers) >= num_layers:
        raise LAYERS.rejected(given, f"this model has layers 0 to {num_layers - 1}")
    if options.ratio is not None:
        one_layer = (1 - options.keep) / num_layers
        reached = len(options.layers) * one_layer
        if abs(reached - options.ratio) > one_layer + 1e-9:
            raise LAYERS.rejected(
                given,
                f"these {len(options.layers)} layers reach ratio {reached:.3f}, "
                f"which does not agree with --orthorank-ratio {options.ratio:.4g}",
            )


def _given_profile(path: str, model: Mapping[str, Any], ratio: float, count: int) -> Profile:
    try:
        profile = read_profile_of(model, path)
    except ProfileError as error:
        raise PROFILE.rejected(path, str(error)) from None
    if count > len(profile.order):
        raise PROFILE.rejected(path, _ranks_too_few(profile, ratio, count))
    return profile


def _ranks_too_few(profile: Profile, ratio: float, count: int) -> str:
    return (
        f"ratio {ratio:.4g} needs {count} selective layers and profile {profile.name} "
        f"ranks {len(profile.order)}"
    )
