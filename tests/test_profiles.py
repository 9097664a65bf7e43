"""Profiles that ship, and profiles written."""

import errno
import hashlib
import json
import struct
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from orthorank_vllm.profiles import (
    Cost,
    Entry,
    Profile,
    ProfileError,
    cached_path,
    config_hash,
    find_profile,
    kept_profiles,
    model_identity,
    model_shape,
    read_profile,
    read_stand_in_facts,
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
    return find_profile(model_identity(config), weights, 128, 64, cache_root)


def keep_in(cache_root: Path, profile: Profile, config: LlamaConfig) -> Path:
    assert profile.weights is not None
    rule = profile.window, profile.tail
    path = cached_path(cache_root, config_hash(config), profile.weights, *rule)
    profile.write(path)
    return path


def profile_of(config: LlamaConfig, **changed: Any) -> Profile:
    entries = (Entry(4, 0.0), Entry(2, 0.25))
    fields = {"entries": entries, "window": 128, "tail": 64, "weights": WEIGHTS, **changed}
    return Profile("mine", model_identity(config), **fields)


def test_the_shipped_profiles_are_found_by_their_models_and_by_whose_weights_they_are() -> None:
    folder = Path(str(resources.files("orthorank_vllm") / "profile_data"))
    profiles = [read_profile(path) for path in folder.glob("*.json")]
    assert profiles
    for profile in profiles:
        rule = profile.window, profile.tail
        has_stand_in = profile.stand_in is not None
        assert find_profile(profile.model, None, *rule, "/nowhere", has_stand_in) == profile
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
    assert find_profile(model_identity(config), WEIGHTS, 64, 64, tmp_path) is None
    assert find_profile(model_identity(config), WEIGHTS, 128, 1, tmp_path) is None
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
    assert len(kept_profiles(tmp_path, config_hash(config), 128, 64)) == 2
    assert kept_profiles(tmp_path, config_hash(config), 128, 1) == []


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
    assert kept_profiles(tmp_path, config_hash(config), 128, 64) == []


def test_a_damaged_file_in_the_cache_is_as_good_as_none(tmp_path: Path) -> None:
    config = smollm2(intermediate_size=1600)
    path = keep_in(tmp_path, profile_of(config), config)
    path.write_text('{"format": 5, "name')
    assert found(config, tmp_path) is None


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    costs = Cost({"prose": 0.01, "copy": 0.2}), Cost({"prose": 0.0}, found=0.95)
    profile = profile_of(
        smollm2(),
        entries=(Entry(4, 0.0, *costs), Entry(2, 1 / 3, costs[1]), Entry(9, 0.25, None, costs[0])),
        alone=({"prose": 0.01, "copy": 0.1}, {"prose": 0.5, "copy": 2.0}),
        data={
            "choosing": {"name": "a", "sha256": "0" * 64, "samples": {"prose": 8}, "prompt": 640},
            "held back": {"name": "b", "sha256": "1" * 64, "samples": {"copy": 4}, "answer": 128},
        },
        dtype="float32",
        versions={"vllm": "0.32.0"},
        date="2026-01-02T03:04:05+00:00",
    )
    profile.write(tmp_path / "mine.json")
    assert read_profile(tmp_path / "mine.json") == profile
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_a_profile_in_which_nothing_is_measured_is_read_as_it_was_written(tmp_path: Path) -> None:
    profile = profile_of(smollm2(), weights=None, entries=())
    profile.write(tmp_path / "mine.json")
    assert read_profile(tmp_path / "mine.json") == profile


def test_the_ratios_are_those_reached_with_each_entry() -> None:
    profile = profile_of(smollm2(), entries=(Entry(4, 0.0), Entry(2, 0.25), Entry(9, 0.5)))
    assert profile.ratios == pytest.approx([1 / 30, 1.75 / 30, 2.25 / 30])


def test_a_costs_worst_is_of_the_kind_that_loses_most() -> None:
    assert Cost({"prose": 0.01, "copy": 0.2, "look-up": 0.1}).worst == 0.2


def test_a_write_that_fails_leaves_the_old_profile_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.json"
    profile_of(smollm2()).write(path)
    before = path.read_text()

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        profile_of(smollm2(), tail=1).write(path)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.json"]


def test_a_folder_is_not_a_profile(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read"):
        read_profile(tmp_path)


def entry(layer: int, keep: float = 0, **more: Any) -> dict[str, Any]:
    return {"layer": layer, "keep": keep, **more}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "its format is 1 and this orthorank-vllm reads 5; measure it anew"),
        ({"format": 4}, "its format is 4 and this orthorank-vllm reads 5; measure it anew"),
        ({"entries": [entry(4), entry(4, 0.5)]}, "must hold different layer indices below 30"),
        ({"entries": [entry(30)]}, "must hold different layer indices below 30"),
        ({"entries": [4, 2]}, r"\['entries'\]\[\d\] \d is not of type 'object'"),
        ({"entries": {"4": 0}}, r"\['entries'\].*is not of type 'array'"),
        ({"entries": [entry(-1)]}, r"\['entries'\]\[0\]\['layer'\]"),
        ({"entries": [entry(4, 1)]}, r"\['entries'\]\[0\]\['keep'\]"),
        ({"entries": [entry(4, cost={"loss": {}})]}, r"\['cost'\]\['loss'\]"),
        ({"entries": [entry(4, held_back={"found": 1})]}, "'loss' is a required property"),
        ({"tail": 0}, r"\['tail'\]"),
        ({"keep": 0.5}, "'keep' was unexpected"),
        ({"surprise": 1}, "'surprise' was unexpected"),
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


def with_stand_ins(folder: Path) -> Path:
    """A profile with stand-ins beside it, as calibration writes them."""
    beside = folder / "mine.safetensors"
    facts = {"model": config_hash(smollm2()), "share": "0.02"}
    header = json.dumps({"__metadata__": facts}).encode()
    beside.write_bytes(struct.pack("<Q", len(header)) + header)
    sha256 = hashlib.sha256(beside.read_bytes()).hexdigest()
    stand_in = {"rank": 64, "share": 0.02, "sha256": sha256}
    profile_of(smollm2(), stand_in=stand_in).write(folder / "mine.json")
    return folder / "mine.json"


def test_a_profile_knows_its_stand_ins_and_counts_their_work_against_the_ratio(
    tmp_path: Path,
) -> None:
    profile = read_profile(with_stand_ins(tmp_path))
    profile.check_stand_in()
    assert profile.stand_in_path == tmp_path / "mine.safetensors"
    assert profile.ratios == pytest.approx([0.98 / 30, 0.98 * 1.75 / 30])


def test_stand_ins_that_are_missing_or_others_are_refused_in_one_line(tmp_path: Path) -> None:
    profile = read_profile(with_stand_ins(tmp_path))
    beside = tmp_path / "mine.safetensors"
    beside.write_bytes(beside.read_bytes()[:-1])
    with pytest.raises(ProfileError, match="holds other stand-ins than it was measured with"):
        profile.check_stand_in()
    beside.unlink()
    with pytest.raises(ProfileError, match=r"cannot be read .*; keep both files together"):
        profile.check_stand_in()


def test_a_kept_profile_without_its_stand_ins_is_measured_anew(tmp_path: Path) -> None:
    config = smollm2()
    config.vocab_size += 1
    path = cached_path(tmp_path, config_hash(config), WEIGHTS, 128, 64, True)
    stand_in = {"rank": 64, "share": 0.02, "sha256": "0" * 64}
    profile_of(config, stand_in=stand_in).write(path)
    model = model_identity(config)
    assert read_profile(path).weights == WEIGHTS
    assert find_profile(model, WEIGHTS, 128, 64, tmp_path, True) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_without_stand_ins_is_named_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match="it holds no stand-ins"):
        read_stand_in_facts(path)
