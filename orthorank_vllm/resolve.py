"""From the options to what is run: which profile is taken, and what does not fit a model."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from orthorank_vllm.config import CALIBRATION_OFF, OrthoRankConfig, ratio_of
from orthorank_vllm.options import (
    AUTO,
    DEFAULT_MAX_LOSS,
    LAYERS,
    OFF,
    PROFILE,
    RATIO,
    STAND_IN,
    TAIL,
    WINDOW,
    Options,
    at_most,
)
from orthorank_vllm.profile_store import kept_profiles, shipped_profile
from orthorank_vllm.profiles import (
    Profile,
    ProfileError,
    read_profile_of,
    read_stand_in_facts,
    stand_in_share_of,
)

# Why a start does not measure, and what would help.
NO_WEIGHTS = (
    "this load format loads no weights",
    "give --orthorank-profile, a file that `orthorank calibrate` made on the weights that are to "
    "come, or --orthorank-layers",
)


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
        max_ratio=options.max_ratio,
        max_loss=max_loss if is_auto else None,
        keep=options.keep,
        window=options.window,
        tail=options.tail,
        min_prompt=options.min_prompt or 0,
        aligned=options.aligned,
        wants_stand_in=options.stand_in != OFF,
        num_layers=num_layers,
        attention=options.attention,
        shadow=options.shadow,
    )
    if options.stand_in not in (AUTO, OFF):
        config = _with_given_stand_in(config, options.stand_in, model)
    if options.layers is not None:
        _check_layers(options, num_layers)
        return config.with_layers(options.layer_keeps, LAYERS.flag)
    if options.profile is not None:
        return config.with_profile(_given_profile(options.profile, model, config))
    to_choose = replace(config, to_choose=True)
    if has_weights:
        to_choose = replace(to_choose, calibrate_seconds=options.calibrate_seconds)
        if kept_profiles(cache_root, model["config_sha256"], config.rule):
            return to_choose
    shipped = shipped_profile(model, config.wants_stand_in)
    if shipped is not None and config.entries_needed(shipped) is not None:
        return config.with_profile(shipped)
    if not has_weights:
        return config.unmeasured(*NO_WEIGHTS)
    if options.calibrate_seconds:
        return to_choose
    option, most = options.most_asked
    if shipped is not None and most != AUTO:
        raise option.rejected(most, _lack(shipped, config))
    return config.unmeasured(*CALIBRATION_OFF)


def measured_elsewhere(config: OrthoRankConfig, weights: str | None) -> Iterator[str]:
    """What to say of a configuration that was measured on other weights.

    Args:
        weights: fingerprint of those that are there; None where they have none.
    """
    # A profile's stand-ins were fitted on what its layers were measured on: one line for both.
    what_by_weights = {
        _fitted_on(config.stand_in): f"file of stand-ins {Path(config.stand_in).name}"
    }
    what_by_weights[config.measured_on] = config.source
    for measured_on, what in what_by_weights.items():
        if weights is not None and measured_on not in ("", weights):
            yield (
                f"OrthoRank's {what} was measured on other weights of this shape, and may not be "
                "the best choice for these: `orthorank calibrate` measures them."
            )


def _fitted_on(stand_in: str) -> str:
    """Fingerprint of the weights that a file of stand-ins was fitted on; empty if unknown."""
    try:
        return str(read_stand_in_facts(stand_in).get("weights", "")) if stand_in else ""
    except ProfileError:
        return ""


def _check_layers(options: Options, num_layers: int) -> None:
    layers = options.layer_keeps
    given = ",".join(map(str, options.layers or ()))
    too_high = [layer for layer, _ in layers if layer >= num_layers]
    if too_high:
        # What YAML makes of 29:0 without quotes, a number in base 60.
        is_yaml = any(layer % 60 == 0 for layer in too_high)
        hint = ' (in a YAML list a layer with its keep needs quotes, "29:0")' if is_yaml else ""
        raise LAYERS.rejected(given, f"this model has layers 0 to {num_layers - 1}{hint}")
    option, asked = options.most_asked
    if asked is not None:
        reached = ratio_of(layers, num_layers)
        one_layer = max(1 - keep for _, keep in layers) / num_layers
        if abs(reached - asked) > one_layer + 1e-9:
            raise LAYERS.rejected(
                given,
                f"these {len(layers)} layers reach ratio {reached:.3f}, "
                f"which does not agree with {option.flag} {asked:.4g}",
            )


def _given_profile(path: str, model: Mapping[str, Any], config: OrthoRankConfig) -> Profile:
    try:
        profile = read_profile_of(model, path)
        if config.wants_stand_in:
            profile.check_stand_in()
    except ProfileError as error:
        raise PROFILE.rejected(path, str(error)) from None
    if config.entries_needed(profile) is None:
        raise PROFILE.rejected(path, _lack(profile, config))
    return profile


def _with_given_stand_in(
    config: OrthoRankConfig, path: str, model: Mapping[str, Any]
) -> OrthoRankConfig:
    try:
        return replace(config, stand_in=path, stand_in_share=stand_in_share_of(model, path))
    except ProfileError as error:
        raise STAND_IN.rejected(path, str(error)) from None


def _lack(profile: Profile, config: OrthoRankConfig) -> str:
    """Why a profile's entries do not make what was asked for."""
    if config.most_asked is not None and not (
        config.is_auto and config.within_loss(profile) is None
    ):
        most = config.reached(profile, len(profile.entries))
        return (
            f"ratio {config.most_asked:.4g} is more than the {at_most(most)} that the "
            f"{len(profile.entries)} layers of profile {profile.name} reach"
        )
    if not any(entry.cost or entry.held_back for entry in profile.entries):
        return f"{RATIO.flag} {AUTO} goes by its losses, and it has none"
    return (
        f"{RATIO.flag} {AUTO} goes by its losses, which were measured with {WINDOW.flag} "
        f"{profile.window} and {TAIL.flag} {profile.tail}; give those"
    )
