"""Profiles that ship, and profiles written."""

import errno
import json
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from orthorank_vllm.profiles import (
    Profile,
    ProfileError,
    cached_path,
    config_hash,
    find_profile,
    kept_profiles,
    model_identity,
    model_shape,
    read_profile,
    shipped_profile,
)

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


def smollm2(**changed: Any) -> LlamaConfig:
    rope = {"rope_theta": 100000.0, "rope_type": "default"}
    return LlamaConfig(**{**SHAPE, "rope_parameters": rope, **changed})


WEIGHTS, OTHER_WEIGHTS = "a" * 64, "b" * 64


def found(
    config: LlamaConfig, cache_root: str | Path = "/nowhere", weights: str | None = WEIGHTS
) -> Profile | None:
    return find_profile(model_identity(config), weights, 1 / 3, 128, cache_root)


def keep_in(cache_root: Path, profile: Profile, config: LlamaConfig) -> Path:
    assert profile.weights is not None
    rule = profile.keep, profile.window
    path = cached_path(cache_root, config_hash(config), profile.weights, *rule)
    profile.write(path)
    return path


def profile_of(config: LlamaConfig, **changed: Any) -> Profile:
    fields = {"order": (4, 2), "keep": 1 / 3, "window": 128, "weights": WEIGHTS, **changed}
    return Profile("mine", model_identity(config), **fields)


def test_the_shipped_profiles_are_measured_and_found_by_their_models() -> None:
    folder = Path(str(resources.files("orthorank_vllm") / "profile_data"))
    profiles = [read_profile(path) for path in folder.glob("*.json")]
    assert profiles
    for profile in profiles:
        rule = profile.keep, profile.window
        assert find_profile(profile.model, None, *rule, "/nowhere") == profile
        assert profile.weights is not None
        assert profile.data is not None
        assert len(profile.losses) == len(profile.order)


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


def test_the_rope_base_is_found_where_older_configurations_keep_it() -> None:
    old = SimpleNamespace(**SHAPE, rope_parameters=None, rope_theta=100000.0)
    assert model_shape(old) == model_shape(smollm2())


def test_a_model_without_grouped_queries_has_as_many_kv_heads_as_heads() -> None:
    shape = model_shape(SimpleNamespace(**{**SHAPE, "num_key_value_heads": None}))
    assert shape["num_key_value_heads"] == 9


def test_a_models_hash_is_of_the_model_and_not_of_how_it_is_run() -> None:
    plain = config_hash(smollm2())
    swapped = smollm2(architectures=["OrthoRankLlamaForCausalLM"], dtype="bfloat16")
    assert config_hash(swapped) == plain
    assert config_hash(smollm2(max_position_embeddings=1024)) != plain


def test_a_profile_measured_here_is_found_by_model_weights_and_rule(tmp_path: Path) -> None:
    config = smollm2(intermediate_size=1600)
    mine = profile_of(config)
    keep_in(tmp_path, mine, config)
    assert found(config, tmp_path) == mine
    assert find_profile(model_identity(config), WEIGHTS, 0.5, 128, tmp_path) is None
    assert find_profile(model_identity(config), WEIGHTS, 1 / 3, 64, tmp_path) is None
    assert found(smollm2(intermediate_size=1700), tmp_path) is None


def test_a_fine_tune_and_its_base_keep_a_profile_each(tmp_path: Path) -> None:
    config = smollm2(intermediate_size=1600)
    base, tuned = profile_of(config), profile_of(config, weights=OTHER_WEIGHTS, order=(7, 8))
    keep_in(tmp_path, base, config)
    assert found(config, tmp_path, OTHER_WEIGHTS) is None
    keep_in(tmp_path, tuned, config)
    assert found(config, tmp_path, OTHER_WEIGHTS) == tuned
    assert found(config, tmp_path) == base
    assert found(config, tmp_path, weights=None) is None
    assert len(kept_profiles(tmp_path, config_hash(config), 1 / 3, 128)) == 2


def test_a_file_that_was_put_in_the_place_of_other_weights_is_not_taken(tmp_path: Path) -> None:
    """Break seen: a profile taken for the name of its file."""
    config = smollm2(intermediate_size=1600)
    path = keep_in(tmp_path, profile_of(config), config)
    profile_of(config, weights=OTHER_WEIGHTS).write(path)
    assert found(config, tmp_path) is None


def test_a_profile_kept_before_weights_were_told_apart_is_not_taken(tmp_path: Path) -> None:
    config = smollm2(intermediate_size=1600)
    old = tmp_path / "orthorank" / f"{config_hash(config)[:32]}-keep0.3333-window128.json"
    profile_of(config).write(old)
    assert found(config, tmp_path) is None
    assert kept_profiles(tmp_path, config_hash(config), 1 / 3, 128) == []


def test_a_damaged_file_in_the_cache_is_as_good_as_none(tmp_path: Path) -> None:
    config = smollm2(intermediate_size=1600)
    path = keep_in(tmp_path, profile_of(config), config)
    path.write_text('{"format": 4, "name')
    assert found(config, tmp_path) is None


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    profile = profile_of(
        smollm2(),
        losses=(1.5, None),
        dense_loss=1.25,
        tried={3: 2.0},
        trials=60,
        data={"name": "a.txt", "sha256": "0" * 64, "tokens": 2048, "length": 512},
        dtype="float32",
        versions={"vllm": "0.32.0"},
        date="2026-01-02T03:04:05+00:00",
    )
    profile.write(tmp_path / "mine.json")
    assert read_profile(tmp_path / "mine.json") == profile
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_a_write_that_fails_leaves_the_old_profile_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.json"
    profile_of(smollm2()).write(path)
    before = path.read_text()

    def full(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        profile_of(smollm2(), order=(9, 8)).write(path)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.json"]


def test_a_folder_is_not_a_profile(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read"):
        read_profile(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "its format is 1 and this orthorank-vllm reads 4; measure it anew"),
        ({"order": [4, 4]}, r"\['order'\].*has non-unique elements"),
        ({"order": "4"}, r"\['order'\].*is not of type 'array'"),
        ({"order": [30]}, "layer indices below 30"),
        ({"keep": 1}, r"\['keep'\]"),
        ({"surprise": 1}, "'surprise' was unexpected"),
        ({"format": 3}, "its format is 3 and this orthorank-vllm reads 4; measure it anew"),
        ({"weights": "the base's"}, r"\['weights'\]"),
        ({"method": "magic"}, r"\['method'\]"),
        ({"model": {}}, r"\['model'\].*is a required property"),
    ],
)
def test_what_is_wrong_with_a_profile_is_said_in_one_line(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "mine.json"
    profile_of(smollm2()).write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ProfileError, match=message) as raised:
        read_profile(path)
    assert "\n" not in str(raised.value)


def test_the_shipped_profile_says_what_becomes_of_look_ups_at_its_ratios() -> None:
    """5, 9 and 14 layers: 0.1, 0.2 and 0.3."""
    shipped = shipped_profile(model_identity(smollm2()))
    assert shipped is not None
    found = [shipped.lookups_with(layers, shipped.keep, shipped.window) for layers in (5, 9, 14)]
    assert found == [0.19, 0.02, 0.0]
