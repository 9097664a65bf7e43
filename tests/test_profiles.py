"""Profiles that ship, and profiles written."""

from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest

from orthorank_vllm.profiles import (
    Profile,
    ProfileError,
    find_profile,
    model_shape,
    read_profile,
)


def llama_config(**changed: object) -> SimpleNamespace:
    values = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "vocab_size": 49152,
    }
    return SimpleNamespace(**{**values, **changed})


def test_the_shipped_profiles_can_all_be_read() -> None:
    folder = Path(str(resources.files("orthorank_vllm") / "profile_data"))
    profiles = [read_profile(path) for path in folder.glob("*.json")]
    assert profiles
    assert all(find_profile(profile.model) == profile for profile in profiles)


def test_smollm2_is_known_by_its_shape() -> None:
    profile = find_profile(model_shape(llama_config()))
    assert profile is not None
    assert profile.order[:3] == (7, 26, 14)


@pytest.mark.parametrize(
    "changed",
    [{"hidden_size": 640}, {"rope_parameters": {"rope_theta": 10000.0}}, {"vocab_size": 49153}],
)
def test_a_model_of_another_shape_is_not_taken_for_it(changed: dict[str, object]) -> None:
    """Break seen: SmolLM-135M, which differs in its rope alone."""
    assert find_profile(model_shape(llama_config(**changed))) is None


def test_the_rope_base_is_found_where_older_configurations_keep_it() -> None:
    old = llama_config(rope_parameters=None, rope_theta=100000.0)
    assert find_profile(model_shape(old)) is not None


def test_a_model_without_grouped_queries_has_as_many_kv_heads_as_heads() -> None:
    assert model_shape(llama_config(num_key_value_heads=None))["num_key_value_heads"] == 9


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    profile = Profile("mine", model_shape(llama_config()), (4, 2), {"loss": [1.5, 2.0]})
    profile.write(tmp_path / "mine.json")
    assert read_profile(tmp_path / "mine.json") == profile
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_a_folder_is_not_a_profile(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read"):
        read_profile(tmp_path)
