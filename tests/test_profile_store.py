"""Profiles that ship, and those that are kept."""

from importlib import resources
from pathlib import Path

import pytest
from transformers import LlamaConfig

from orthorank_vllm.profile_store import find_profile, kept_path, kept_profiles
from orthorank_vllm.profiles import (
    Entry,
    Profile,
    config_hash,
    model_identity,
    read_profile,
)
from tests.support.profiles import OTHER_WEIGHTS, RULE, WEIGHTS, WITH_STAND_IN, profile_of, smollm2


def found(
    config: LlamaConfig, cache_root: str | Path = "/nowhere", weights: str | None = WEIGHTS
) -> Profile | None:
    return find_profile(model_identity(config), weights, RULE, cache_root)


def keep_in(cache_root: Path, profile: Profile, config: LlamaConfig) -> Path:
    assert profile.weights is not None
    path = kept_path(cache_root, config_hash(config), profile.weights, profile.rule)
    profile.write(path)
    return path


def test_the_shipped_profiles_are_found_by_their_models_and_by_whose_weights_they_are() -> None:
    folder = Path(str(resources.files("orthorank_vllm") / "profile_data"))
    profiles = [read_profile(path) for path in folder.glob("*.json")]
    assert profiles
    for profile in profiles:
        assert find_profile(profile.model, None, profile.rule, "/nowhere") == profile
        profile.check_stand_in()
        assert profile.weights is not None
        assert profile.entries


def test_smollm2_is_known_by_its_shape() -> None:
    assert found(smollm2()) is not None


@pytest.mark.parametrize(
    "changed",
    [
        {"intermediate_size": 1600},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        {"vocab_size": 49153},
    ],
)
def test_a_model_of_another_shape_is_not_taken_for_it(changed: dict[str, object]) -> None:
    """Break seen: SmolLM-135M, which differs in its rope alone."""
    assert found(smollm2(**changed)) is None


def test_a_profile_measured_here_is_found_by_model_weights_and_rule(tmp_path: Path) -> None:
    config = smollm2(intermediate_size=1600)
    mine = profile_of(config)
    keep_in(tmp_path, mine, config)
    assert found(config, tmp_path) == mine
    assert find_profile(model_identity(config), WEIGHTS, RULE._replace(window=64), tmp_path) is None
    assert find_profile(model_identity(config), WEIGHTS, RULE._replace(tail=1), tmp_path) is None
    assert found(smollm2(intermediate_size=1700), tmp_path) is None


def test_a_fine_tune_and_its_base_keep_a_profile_each(tmp_path: Path) -> None:
    config = smollm2(intermediate_size=1600)
    base = profile_of(config)
    tuned = profile_of(config, weights=OTHER_WEIGHTS, entries=(Entry(7, 0.0),))
    keep_in(tmp_path, base, config)
    assert found(config, tmp_path, OTHER_WEIGHTS) is None
    keep_in(tmp_path, tuned, config)
    assert found(config, tmp_path, OTHER_WEIGHTS) == tuned
    assert found(config, tmp_path) == base
    assert found(config, tmp_path, weights=None) is None
    assert len(kept_profiles(tmp_path, config_hash(config), RULE)) == 2
    assert kept_profiles(tmp_path, config_hash(config), RULE._replace(tail=1)) == []


def test_a_file_that_was_put_in_the_place_of_other_weights_is_not_taken(tmp_path: Path) -> None:
    """Break seen: a profile taken for the name of its file."""
    config = smollm2(intermediate_size=1600)
    path = keep_in(tmp_path, profile_of(config), config)
    profile_of(config, weights=OTHER_WEIGHTS).write(path)
    assert found(config, tmp_path) is None


def test_a_profile_kept_by_an_older_version_is_not_taken(tmp_path: Path) -> None:
    """Guards against: a name that today's pattern finds, with what it cannot read."""
    config = smollm2(intermediate_size=1600)
    name = f"{config_hash(config)[:32]}-{WEIGHTS[:16]}-keep0.3333-window128.json"
    profile_of(config).write(tmp_path / "orthorank" / name)
    assert found(config, tmp_path) is None
    assert kept_profiles(tmp_path, config_hash(config), RULE) == []


def test_a_damaged_file_in_the_cache_is_as_good_as_none(tmp_path: Path) -> None:
    config = smollm2(intermediate_size=1600)
    path = keep_in(tmp_path, profile_of(config), config)
    path.write_text('{"format": 5, "name')
    assert found(config, tmp_path) is None


def test_a_kept_profile_without_its_stand_ins_is_measured_anew(tmp_path: Path) -> None:
    config = smollm2()
    config.vocab_size += 1
    path = kept_path(tmp_path, config_hash(config), WEIGHTS, WITH_STAND_IN)
    stand_in = {"rank": 64, "share": 0.02, "sha256": "0" * 64}
    profile_of(config, stand_in=stand_in).write(path)
    model = model_identity(config)
    assert read_profile(path).weights == WEIGHTS
    assert find_profile(model, WEIGHTS, WITH_STAND_IN, tmp_path) is None
