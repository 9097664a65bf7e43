"""Where profiles are: kept in the cache, as measured on this machine, or shipped in the package."""

import json
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from orthorank_vllm.profiles import MeasuredRule, Profile, ProfileError, from_json, read_profile


def kept_folder(cache_root: str | Path) -> Path:
    """Where all profiles are kept that were measured on this machine."""
    return Path(cache_root) / "orthorank"


def kept_path(cache_root: str | Path, sha256: str, weights: str, rule: MeasuredRule) -> Path:
    """Where the profile of a model is kept that was measured on this machine.

    Args:
        sha256, weights: of its configuration, and the fingerprint of its weights.
    """
    return kept_folder(cache_root) / _kept_name(sha256, weights[:16], rule)


def _kept_name(sha256: str, weights: str, rule: MeasuredRule) -> str:
    stand_in = "-stand-in" if rule.has_stand_in else ""
    return f"{sha256[:32]}-{weights}-window{rule.window}-tail{rule.tail}{stand_in}.json"


def kept_profiles(cache_root: str | Path, sha256: str, rule: MeasuredRule) -> list[Path]:
    """Where `kept_path` has profiles of this configuration, of whatever weights; newest first."""
    found = kept_folder(cache_root).glob(_kept_name(sha256, "*", rule))
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def shipped_profiles() -> Iterator[Profile]:
    """The profiles in the package."""
    folder = resources.files("orthorank_vllm") / "profile_data"
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".json"):
            yield from_json(json.loads(entry.read_text()), Path(str(entry)))


def shipped_profile(model: Mapping[str, Any], has_stand_in: bool) -> Profile | None:
    """The profile in the package that fits by shape, whatever weights it was measured on."""
    for profile in shipped_profiles():
        if profile.fits(model) and profile.rule.has_stand_in == has_stand_in:
            return profile
    return None


def find_profile(
    model: Mapping[str, Any], weights: str | None, rule: MeasuredRule, cache_root: str | Path
) -> Profile | None:
    """The profile of a model: measured on this machine with this rule, or else shipped.

    Args:
        model: see `model_identity`.
        weights: their fingerprint; without one nothing is known to be measured on them.
        cache_root: vLLM's, see `kept_path`.
    """
    if weights is not None:
        try:
            kept = read_profile(kept_path(cache_root, model["config_sha256"], weights, rule))
            kept.check_stand_in()
        except ProfileError:
            # Not there, or of another version: measured anew where that is asked for.
            return shipped_profile(model, rule.has_stand_in)
        if kept.weights == weights:
            return kept
    return shipped_profile(model, rule.has_stand_in)
