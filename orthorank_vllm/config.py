"""Which layers are selective: the options, resolved for one model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from orthorank_vllm.options import OptionError, Options, rejected
from orthorank_vllm.profiles import Profile, ProfileError, find_profile, read_profile_of

# Without a measured order, the first layers (which form the sink) and the last
# ones (which form the prediction) stay dense.
UNMEASURED_DENSE_HEAD = 3
UNMEASURED_DENSE_TAIL = 2
UNMEASURED = "even spacing (not measured)"


@dataclass(frozen=True)
class OrthoRankConfig:
    """What is run: options resolved for one model. Travels to every worker as a dict.

    Attributes:
        to_choose: layers that a calibration at start-up has still to choose; 0
            where `layers` is final.
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

    @property
    def ratio(self) -> float:
        """The ratio reached: the fraction of token-layer updates that prefill skips."""
        return len(self.layers) * (1 - self.keep) / self.num_layers

    @property
    def measured(self) -> bool:
        """Whether the layers were measured, or given by hand."""
        return is_measured(self.source)

    def as_dict(self) -> dict[str, Any]:
        """JSON types only: vLLM hashes its additional_config by `json.dumps`."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "OrthoRankConfig":
        return cls(**{**values, "layers": tuple(values["layers"])})

    def with_layers(self, layers: Sequence[int], source: str) -> "OrthoRankConfig":
        """The same with its layers chosen."""
        return replace(self, layers=tuple(sorted(layers)), source=source, to_choose=0)

    def evenly_spaced(self) -> "OrthoRankConfig":
        """The same with layers that nothing was measured for.

        Raises:
            OptionError: there are too few that may be guessed.
        """
        assert self.ratio_asked is not None
        layers = _evenly_spaced(self.ratio_asked, self.to_choose, self.num_layers)
        return self.with_layers(layers, UNMEASURED)

    def describe(self) -> str:
        """The start-up line."""
        asked = "" if self.ratio_asked is None else f" (asked for {self.ratio_asked:.3g})"
        window = f"window {self.window}" if self.window else "window: whole prompt"
        return (
            f"OrthoRank is active: ratio {self.ratio:.3f}{asked}, keep {self.keep:.3f}, {window}, "
            f"{len(self.layers)} of {self.num_layers} layers selective "
            f"[{','.join(map(str, self.layers))}], chosen by {self.source}"
        )


def is_measured(source: str) -> bool:
    """`OrthoRankConfig.measured`, where only the source is known."""
    return source != UNMEASURED


def resolve(options: Options, model: Mapping[str, Any], cache_root: str) -> OrthoRankConfig:
    """Choose the selective layers of one model, or leave that to a calibration at start-up.

    Args:
        options: active options.
        model: see `profiles.model_identity`.
        cache_root: vLLM's, where calibrated profiles are kept.

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
    count = selective_count("--orthorank-ratio", options.ratio, options.keep, num_layers)
    profile = _profile_of(options, model, cache_root)
    if profile is not None and count <= len(profile.order):
        return config.with_layers(profile.order[:count], profile.describe(options.keep))
    config = replace(config, to_choose=count)
    if options.profile is None and options.calibrate_seconds:
        return replace(config, calibrate_seconds=options.calibrate_seconds)
    if profile is not None:
        raise rejected(
            "profile" if options.profile else "ratio",
            options.profile or options.ratio,
            f"ratio {options.ratio:.4g} needs {count} selective layers and profile {profile.name} "
            f"ranks {len(profile.order)}",
        )
    return config.evenly_spaced()


def selective_count(option: str, ratio: float, keep: float, num_layers: int) -> int:
    """`ratio x layers / (1 - keep)`, rounded half up.

    Raises:
        OptionError: it is none, or more than there are; names `option`.
    """
    # The small term keeps a half a half: 0.3 x 30 / (2/3) is 13.5, not 13.49999.
    count = math.floor(ratio * num_layers / (1 - keep) + 0.5 + 1e-9)
    if not 0 < count <= num_layers:
        raise OptionError(
            f"{option} {ratio}: not allowed, it makes {count} of this model's {num_layers} layers "
            f"selective; give {(1 - keep) / num_layers:.4g} to {1 - keep:.4g}"
        )
    return count


def _check_layers(options: Options, num_layers: int) -> None:
    assert options.layers is not None
    given = ",".join(map(str, options.layers))
    if max(options.layers) >= num_layers:
        raise rejected("layers", given, f"this model has layers 0 to {num_layers - 1}")
    if options.ratio is not None:
        one_layer = (1 - options.keep) / num_layers
        reached = len(options.layers) * one_layer
        if abs(reached - options.ratio) > one_layer + 1e-9:
            raise rejected(
                "layers",
                given,
                f"these {len(options.layers)} layers reach ratio {reached:.3f}, "
                f"which does not agree with --orthorank-ratio {options.ratio:.4g}",
            )


def _profile_of(options: Options, model: Mapping[str, Any], cache_root: str) -> Profile | None:
    if options.profile is None:
        return find_profile(model, options.keep, options.window, cache_root)
    try:
        return read_profile_of(model, options.profile)
    except ProfileError as error:
        raise rejected("profile", options.profile, str(error)) from None


def _evenly_spaced(ratio: float, count: int, num_layers: int) -> tuple[int, ...]:
    candidates = num_layers - UNMEASURED_DENSE_HEAD - UNMEASURED_DENSE_TAIL
    if count > candidates:
        raise rejected(
            "ratio",
            ratio,
            f"it needs {count} selective layers, and without a profile only {max(candidates, 0)} "
            f"of this model's {num_layers} may be; give --orthorank-layers",
        )
    return tuple(
        UNMEASURED_DENSE_HEAD + (2 * i + 1) * candidates // (2 * count) for i in range(count)
    )
