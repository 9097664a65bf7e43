"""What a user may ask for, and the one line that answers what he may not."""

import json
from pathlib import Path
from typing import Any

import pytest

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.options import LayerKeep, OptionError, Options
from orthorank_vllm.profile_store import kept_path, shipped_profile
from orthorank_vllm.profiles import Cost, Entry, Profile
from orthorank_vllm.resolve import resolve

THIRD = 1 / 3
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rope_theta": 100000.0,
    "vocab_size": 49152,
    "config_sha256": "5" * 64,
}
UNKNOWN = {**SMOLLM2, "hidden_size": 640}
ENTRIES = (Entry(29, 0.0, Cost({"prose": 0.01})), Entry(4, 0.25, Cost({"prose": 0.03})))
MINE = Profile("mine", SMOLLM2, ENTRIES, window=128, tail=64)
WITH_STAND_IN = MINE.rule._replace(has_stand_in=True)


def resolved(model: dict[str, Any] = SMOLLM2, **given: Any) -> OrthoRankConfig:
    return resolve(Options.from_mapping(given), model, cache_root="/nowhere")


def shipped() -> Profile:
    profile = shipped_profile(SMOLLM2, has_stand_in=True)
    assert profile is not None
    return profile


def written(folder: Path, profile: Profile = MINE, **changed: Any) -> str:
    path = folder / "mine.json"
    profile.write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    return str(path)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"layers": [30]}, "--orthorank-layers 30: not allowed, this model has layers 0 to 29"),
        # As YAML reads 20:0 and 0:0, 29:0 in a list without quotes.
        (
            {"layers": [1200]},
            'layers 0 to 29 (in a YAML list a layer with its keep needs quotes, "',
        ),
        (
            {"layers": "0,1740"},
            "--orthorank-layers 0,1740: not allowed, this model has layers 0 to",
        ),
        (
            {"layers": [3, 4], "ratio": 0.3},
            "these 2 layers reach ratio 0.044, which does not agree",
        ),
        ({"layers": "3:0,4:0", "ratio": 0.11}, "these 2 layers reach ratio 0.067"),
        ({"ratio": 0.99, "calibrate_seconds": 0}, "layers of profile SmolLM2-135M-Instruct reach"),
        ({"ratio": 0.3, "profile": "/nowhere.json"}, "cannot be read (No such file"),
    ],
)
def test_an_option_that_does_not_fit_the_model_is_named_in_one_line(
    given: dict[str, Any], named: str
) -> None:
    with pytest.raises(OptionError) as caught:
        resolved(**given)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "ratio", "named"),
    [
        ({"format": 4}, 0.03, "its format is 4 and this orthorank-vllm reads 5"),
        ({"entries": [{"layer": 1, "keep": 1}]}, 0.03, "it is not a valid profile"),
        ({"model": UNKNOWN}, 0.03, "measured on another model (hidden_size 640 against 576)"),
        ({}, 0.3, "ratio 0.3 is more than the 0.0583 that the 2 layers of profile mine reach"),
        (
            {"entries": [{"layer": 1, "keep": 0}]},
            "auto",
            "--orthorank-ratio auto goes by its losses, and it has none",
        ),
        (
            {"tail": 1},
            "auto",
            "which were measured with --orthorank-window 128 and --orthorank-tail 1; give those",
        ),
    ],
)
def test_a_profile_that_cannot_be_used_says_why(
    tmp_path: Path, changed: dict[str, Any], ratio: object, named: str
) -> None:
    path = written(tmp_path, **changed)
    with pytest.raises(OptionError) as caught:
        resolved(ratio=ratio, profile=path)
    assert str(caught.value).startswith(f"--orthorank-profile {path}: not allowed, ")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_message_says_to_be_the_most_is_allowed(tmp_path: Path) -> None:
    """Guards against: rounded up."""
    path = written(tmp_path)
    assert len(resolved(ratio=0.0583, profile=path).layers) == 2
    assert resolved(ratio=0.6666, keep="1/3", calibrate_seconds=9).to_choose


def test_a_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{")
    with pytest.raises(OptionError, match="it is not JSON"):
        resolved(ratio=0.3, profile=str(path))


def test_the_shipped_profile_is_found_by_the_shape_of_the_model() -> None:
    profile = shipped()
    config = resolved(ratio=0.1)
    count = len(config.layers)
    assert config.layers == tuple(entry.layer_keep for entry in profile.entries[:count])
    skipped = [ratio / (1 - profile.share) + 1e-9 for ratio in profile.ratios]
    assert skipped[count - 2] < 0.1 <= skipped[count - 1]
    assert config.source == f"profile {profile.name}"
    assert config.measured
    assert config.measured_on == profile.weights
    assert resolved(layers="7,26").measured_on == ""


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        ("20:0,21:0,12:1/4", [(20, 0.0), (21, 0.0), (12, 0.25)]),
        ("7,26, 14", [(7, THIRD), (26, THIRD), (14, THIRD)]),
        ([29, 0], [(29, THIRD), (0, THIRD)]),
        (["29:0", "12:1/4", 7], [(29, 0.0), (12, 0.25), (7, THIRD)]),
        ([[29, 0], (12, 0.25), (7, "1/2"), (5, None)], [(29, 0), (12, 0.25), (7, 0.5), (5, THIRD)]),
    ],
)
def test_layers_by_hand_are_used_as_they_are_in_their_order(
    given: object, layers: list[tuple[int, float]]
) -> None:
    config = resolved(UNKNOWN, layers=given)
    assert config.layers == tuple(LayerKeep(*layer) for layer in layers)
    assert (config.source, config.measured) == ("--orthorank-layers", True)


def test_a_keep_is_that_of_layers_without_one() -> None:
    assert resolved(layers="3:0,5", keep=0.5).layers == (LayerKeep(3, 0.0), LayerKeep(5, 0.5))


def test_a_ratio_given_with_layers_may_differ_by_one_layers_share() -> None:
    for ratio in (0.07, 0.1, 0.11):
        assert len(resolved(layers=[3, 5, 7, 9], ratio=ratio).layers) == 4
    assert len(resolved(layers="3:0,4:0", ratio=0.1).layers) == 2


def test_a_profile_file_gives_its_first_layers(tmp_path: Path) -> None:
    config = resolved(ratio=0.03, profile=written(tmp_path))
    assert config.layers == (LayerKeep(29, 0.0),)
    assert config.source == "profile mine"
    assert config.expected == ENTRIES[0].cost


def test_auto_goes_by_the_figures_of_a_profile(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert len(resolved(ratio="auto", profile=path).layers) == 1
    config = resolved(ratio="auto", max_loss=0.05, profile=path)
    assert (len(config.layers), config.max_loss, config.ratio_asked) == (2, 0.05, None)


def test_auto_with_a_rule_that_the_shipped_profile_is_not_of_is_measured() -> None:
    """Guards against: its figures, of another tail."""
    config = resolved(ratio="auto", tail=9)
    assert (config.to_choose, config.layers, config.max_loss) == (True, (), 0.02)
    assert resolved(ratio="auto", tail=9, calibrate_seconds=0).layers == ()


def test_without_a_profile_the_layers_are_left_to_a_calibration_at_start_up() -> None:
    config = resolved(UNKNOWN, ratio=0.3)
    assert (config.to_choose, config.layers, config.calibrate_seconds) == (True, (), 300)


def test_a_ratio_past_the_shipped_profile_is_calibrated_too() -> None:
    assert resolved(ratio=0.9).to_choose


def test_without_a_profile_and_a_calibration_the_last_layers_are_taken() -> None:
    config = resolved(UNKNOWN, ratio=0.3, calibrate_seconds=0)
    assert config.layers == tuple(LayerKeep(layer, 0.0) for layer in range(29, 20, -1))
    with pytest.raises(OptionError, match="only the last 15 of this model's 30 may be; measure"):
        resolved(UNKNOWN, ratio=0.6, calibrate_seconds=0)


def test_where_a_profile_was_measured_here_the_choice_waits_for_the_weights(tmp_path: Path) -> None:
    """Whose it is, the weights tell; before them goes neither it nor the shipped one."""
    MINE.write(kept_path(tmp_path, "5" * 64, "a" * 64, WITH_STAND_IN))
    options = Options.from_mapping({"ratio": 0.1, "calibrate_seconds": 0})
    waiting = resolve(options, SMOLLM2, str(tmp_path))
    assert (waiting.to_choose, waiting.layers, waiting.calibrate_seconds) == (True, (), 0)
    for rule in ({"window": 64}, {"tail": 1}):
        options = Options.from_mapping({"ratio": 0.1, **rule})
        assert resolve(options, SMOLLM2, str(tmp_path)).source == f"profile {shipped().name}"


def test_a_start_without_weights_measures_nothing_and_takes_nothing_kept(tmp_path: Path) -> None:
    """Break seen: a server of random weights that calibrated on them."""
    for model in (SMOLLM2, UNKNOWN):
        MINE.write(kept_path(tmp_path, "5" * 64, "a" * 64, WITH_STAND_IN))
        options = Options.from_mapping({"ratio": 0.1})
        config = resolve(options, model, str(tmp_path), has_weights=False)
        assert not config.to_choose
        assert config.layers
        assert config.measured == (model is SMOLLM2)
    assert config.source == "the last layers, not measured: this load format loads no weights"
    assert "--orthorank-profile" in config.remedy
    assert "seconds" not in config.remedy


def test_stand_ins_come_with_the_profile_unless_they_are_off() -> None:
    """Each with layers that were chosen so."""
    auto, off = resolved(ratio=0.3), resolved(ratio=0.3, stand_in="off")
    assert Path(auto.stand_in).name == "smollm2-135m.safetensors"
    assert auto.stand_in_share == shipped().share > 0
    assert auto.expected is not None
    assert (off.stand_in, off.stand_in_share) == ("", 0)
    assert off.layers != auto.layers
    assert off.expected is not None
    assert resolved(layers=[3, 4]).stand_in == ""


def test_stand_ins_given_by_hand_are_run_and_no_loss_is_claimed_of_them(tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    path = shipped().stand_in_path
    assert path is not None
    own.write_bytes(path.read_bytes())
    model = {**SMOLLM2, "config_sha256": shipped().model["config_sha256"]}
    config = resolved(model, ratio=0.3, stand_in=str(own))
    assert (config.stand_in, config.expected) == (str(own), None)
    assert resolved(model, layers=[3, 4], stand_in=str(own)).stand_in == str(own)


@pytest.mark.parametrize(
    ("model", "name", "why"),
    [
        (SMOLLM2, "none.safetensors", r"it cannot be read \(No such file or directory\)"),
        (UNKNOWN, "", "it was fitted on a model of another configuration"),
    ],
)
def test_stand_ins_that_cannot_be_are_refused(
    tmp_path: Path, model: dict[str, Any], name: str, why: str
) -> None:
    path = str(tmp_path / name if name else shipped().stand_in_path)
    with pytest.raises(OptionError, match=f"--orthorank-stand-in {path}: not allowed, {why}"):
        resolved(model, ratio=0.3, stand_in=path)


def test_the_profiles_layers_are_taken_up_to_the_largest_ratio() -> None:
    config = resolved(ratio=0.1, max_ratio=0.3)
    assert config.layers == resolved(ratio=0.3).layers
    assert config.default_layers == resolved(ratio=0.1).layers
    assert config.num_for(0.1) == config.num_default
    only = resolved(max_ratio=0.3)
    assert (only.default_layers, only.ratio) == ((), 0)


def test_layers_by_hand_have_to_make_the_largest_ratio() -> None:
    config = resolved(layers="3:0,4:0,5:0", ratio=0.05, max_ratio=0.1)
    assert (len(config.layers), config.num_default) == (3, 2)
    assert resolved(layers="3:0,4:0,5:0", max_ratio=0.1).num_default == 3
    with pytest.raises(OptionError, match=r"does not agree with --orthorank-max-ratio 0\.3"):
        resolved(layers="3:0,4:0", max_ratio=0.3)


def test_a_largest_ratio_past_a_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--orthorank-max-ratio 0\.99: not allowed, ratio 0\.99"):
        resolved(ratio=0.1, max_ratio=0.99, calibrate_seconds=0)
