"""The layers that are evaluated: a profile's first ones, or those given by hand."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orthorank_vllm.calibrate.text import Text
from orthorank_vllm.compat import cache_root
from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.evaluate.runs import Layers
from orthorank_vllm.options import AUTO, OFF, OptionError
from orthorank_vllm.profile_store import (
    kept_path,
    kept_profiles,
    shipped_profile,
    shipped_profiles,
)
from orthorank_vllm.profiles import (
    MeasuredRule,
    Profile,
    ProfileError,
    read_profile,
    read_profile_of,
    stand_in_share_of,
)
from orthorank_vllm.selection.method import Method


def profile_to_test(
    path: str | None, model: Mapping[str, Any], rule: Method, text: Text, has_stand_in: bool
) -> Profile:
    """The given profile, or else this machine's or the shipped one.

    Args:
        model: see `profiles.model_identity`.
        has_stand_in: whether the layers of one that is not given are to be chosen with stand-ins.
        text: what it is to be tested on.

    Raises:
        OptionError: it cannot be used or was chosen on that text, or there is none.
    """
    profile = _known(model, rule, has_stand_in) if path is None else _given(path, model)
    if profile is None:
        raise OptionError(
            "--profile: none is known for this model; run `orthorank calibrate` first, or give "
            "one, or --layers"
        )
    for data in (profile.data or {}).values():
        if data["sha256"] == text.sha256:
            raise OptionError(
                f"--data {text.name}: the profile {profile.name} was chosen on it; a choice must "
                "not be tested on what it was made on"
            )
    return profile


def _given(path: str, model: Mapping[str, Any]) -> Profile:
    try:
        return read_profile_of(model, path)
    except ProfileError as error:
        raise OptionError(f"--profile {path}: {error}") from None


def _known(model: Mapping[str, Any], rule: Method, has_stand_in: bool) -> Profile | None:
    measured = MeasuredRule(rule.window, rule.tail, has_stand_in)
    kept = kept_profiles(cache_root(), model["config_sha256"], measured)
    if kept:
        try:
            return read_profile(kept[0])
        except ProfileError:
            # Of another version: no server takes it either.
            pass
    return shipped_profile(model, has_stand_in)


def stand_ins_to_test(
    given: str, model: Mapping[str, Any], profile: Profile | None
) -> tuple[Path | None, float]:
    """The file of what stands in for skipped updates, and its share of a layer's work.

    Args:
        given: as `--stand-in`.
        profile: that brings its own.

    Raises:
        OptionError: it cannot be used.
    """
    try:
        if given not in (AUTO, OFF):
            return Path(given), stand_in_share_of(model, given)
        if given == OFF or profile is None:
            return None, 0.0
        profile.check_stand_in()
        return profile.stand_in_path, profile.share
    except ProfileError as error:
        raise OptionError("--stand-in", given, str(error)) from None


def check_weights(
    profile: Profile, model: Mapping[str, Any], weights: str | None, rule: Method, is_given: bool
) -> None:
    """Look whether a server would take the profile, now that the weights are loaded.

    Args:
        weights: their fingerprint, None if they have none.
        is_given: whether the user named the profile.

    Raises:
        OptionError: it would take another profile, as this one is kept for other weights.
    """
    if weights is None or profile.weights in (None, weights):
        return
    told = f"the profile {profile.name} was measured on other weights of this shape"
    if is_given or profile in shipped_profiles():
        print(f"note: {told}", file=sys.stderr)
        return
    own = kept_path(
        cache_root(),
        model["config_sha256"],
        weights,
        MeasuredRule(rule.window, rule.tail, profile.rule.has_stand_in),
    )
    give = f"give --profile {own}" if own.exists() else "run `orthorank calibrate` on these"
    raise OptionError(f"--profile: {told}, and a server would not take it; {give}")


def layers_at(
    profile: Profile,
    ratio: float,
    keep: float | None,
    rule: Method,
    wants_stand_in: bool = False,
) -> Layers:
    """The layers that a server takes of a profile.

    Args:
        keep: of every layer, if given by hand.
        wants_stand_in: whether it takes the profile's stand-ins, too.

    Raises:
        OptionError: the profile has too few.
    """
    config = OrthoRankConfig(
        ratio,
        rule.window,
        rule.tail,
        profile.num_layers,
        keep=keep,
        wants_stand_in=wants_stand_in,
    )
    chosen = config.with_profile(profile)
    if config.entries_needed(profile) is None:
        raise OptionError(
            f"--ratios {ratio:g}: it is more than the {chosen.ratio:.4g} that the "
            f"{len(profile.entries)} layers of the profile {profile.name} reach; run `orthorank "
            "calibrate` with a larger --max-ratio"
        )
    return chosen.layers


def check_layers(layers: Layers, num_layers: int) -> None:
    """Check that the model has the layers that were given by hand.

    Raises:
        OptionError: it has fewer.
    """
    if max(layer for layer, _ in layers) >= num_layers:
        given = ",".join(map(str, layers))
        raise OptionError("--layers", given, f"this model has layers 0 to {num_layers - 1}")
