"""What a user may ask for, and the one line that answers what he may not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orthorank_vllm.config import OrthoRankConfig, resolve
from orthorank_vllm.options import OptionError, Options
from orthorank_vllm.profiles import Profile, cached_path

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
PROFILE = {
    "format": 4,
    "name": "mine",
    "model": SMOLLM2,
    "method": "orthorank",
    "keep": 1 / 3,
    "window": 128,
    "order": [1],
}


def resolved(model: dict[str, Any] = SMOLLM2, **given: Any) -> OrthoRankConfig:
    return resolve(Options.from_mapping(given), model, cache_root="/nowhere")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"ratio": -0.1}, "--orthorank-ratio -0.1"),
        ({"ratio": 1}, "--orthorank-ratio 1"),
        ({"ratio": float("nan")}, "--orthorank-ratio nan"),
        ({"ratio": "a third"}, "--orthorank-ratio a third"),
        ({"ratio": True}, "--orthorank-ratio True"),
        ({"ratio": 0.7}, "--orthorank-ratio 0.7: not allowed, with --orthorank-keep 0.3333"),
        ({"ratio": 0.3, "keep": 0}, "--orthorank-keep 0"),
        ({"ratio": 0.3, "keep": 1}, "--orthorank-keep 1"),
        ({"ratio": 0.3, "keep": "1/0"}, "--orthorank-keep 1/0: not allowed, give a number"),
        ({"ratio": 0.3, "window": -1}, "--orthorank-window -1"),
        ({"ratio": 0.3, "window": 1.5}, "--orthorank-window 1.5"),
        ({"layers": "3,x"}, "--orthorank-layers 3,x"),
        ({"layers": "3,3"}, "--orthorank-layers 3,3"),
        ({"layers": [-1, 4]}, "--orthorank-layers [-1, 4]"),
        ({"layers": []}, "--orthorank-layers []"),
        ({"layers": [1.0]}, "--orthorank-layers [1.0]"),
        ({"layers": [3], "profile": "p.json"}, "it excludes --orthorank-profile p.json"),
        ({"keep": 0.5}, "--orthorank-keep 0.5: not allowed, it changes nothing without"),
        ({"profile": "p.json"}, "--orthorank-profile p.json: not allowed, it changes nothing"),
        ({"ratio": 0.3, "sparsity": 1}, "unknown key 'sparsity': allowed are ratio, keep"),
        (0.3, 'additional_config["orthorank"] = 0.3'),
    ],
)
def test_a_wrong_option_is_named_in_one_line(given: Any, named: str) -> None:
    with pytest.raises(OptionError) as caught:
        Options.from_mapping(given)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_fraction_may_be_written_as_one() -> None:
    options = Options.from_mapping({"ratio": "3/10", "keep": "1/5"})
    assert (options.ratio, options.keep) == (0.3, 0.2)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"layers": [30]}, "this model has layers 0 to 29"),
        ({"layers": [3, 4], "ratio": 0.3}, "reach ratio 0.044"),
        ({"ratio": 0.001}, "makes 0 of this model's 30 layers selective; give 0.02222 to 0.6667"),
        (
            {"ratio": 0.6, "calibrate_seconds": 0},
            "needs 27 selective layers and profile SmolLM2-135M-Instruct ranks 14",
        ),
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


def test_more_layers_than_an_unmeasured_model_may_lose_is_an_error() -> None:
    with pytest.raises(OptionError, match=r"only 25 of this model's 30 may be; measure") as raised:
        resolved(UNKNOWN, ratio=0.6, calibrate_seconds=0)
    assert "--orthorank-calibrate-seconds is 0" in str(raised.value)


def test_too_many_layers_after_too_little_time_names_the_time_and_the_option() -> None:
    """Break seen: a remedy for a model without a profile, for one whose time had run out."""
    config = resolved(UNKNOWN, ratio=0.6, calibrate_seconds=5)
    with pytest.raises(OptionError) as raised:
        config.evenly_spaced("5 s were too few", "give --orthorank-calibrate-seconds 70 or more")
    assert str(raised.value) == (
        "--orthorank-ratio 0.6: not allowed, it needs 27 selective layers, and of layers that are "
        "not measured (5 s were too few) only 25 of this model's 30 may be; give "
        "--orthorank-calibrate-seconds 70 or more"
    )


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "it is not JSON"),
        (json.dumps({**PROFILE, "format": 1}), "its format is 1 and this orthorank-vllm reads 4"),
        (json.dumps({**PROFILE, "order": [1, 1]}), "has non-unique elements"),
        (
            json.dumps({**PROFILE, "model": UNKNOWN}),
            "measured on another model (hidden_size 640 against 576)",
        ),
        (json.dumps(PROFILE), "ranks 1"),
    ],
)
def test_a_profile_that_cannot_be_used_says_why(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(OptionError) as caught:
        resolved(ratio=0.3, profile=str(path))
    assert str(path) in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize("given", [{}, {"ratio": 0}, {"ratio": 0.0, "layers": [3]}])
def test_a_ratio_of_zero_or_none_is_off(given: dict[str, Any]) -> None:
    assert not Options.from_mapping(given).is_active


def test_the_number_of_selective_layers_is_rounded_half_up() -> None:
    """Break seen: 0.3 x 30 / (2/3) = 13.5 is 13.49999 in floats."""
    assert len(resolved(ratio=0.3).layers) == 14
    assert len(resolved(ratio=0.09).layers) == 4


def test_the_ratio_reached_is_what_is_reported() -> None:
    config = resolved(ratio=0.3)
    assert config.ratio == pytest.approx(14 * (2 / 3) / 30)
    assert "ratio 0.311 (asked for 0.3)" in config.describe()


def test_the_shipped_profile_is_found_by_the_shape_of_the_model() -> None:
    config = resolved(ratio=0.1)
    assert set(config.layers) == {5, 4, 6, 7, 3}
    assert config.source == "profile SmolLM2-135M-Instruct"
    assert config.measured


def test_layers_by_hand_are_used_as_they_are_in_any_order() -> None:
    assert resolved(layers="7,26, 14").layers == (7, 14, 26)
    assert resolved(UNKNOWN, layers=[29, 0]).layers == (0, 29)


def test_a_ratio_given_with_layers_may_differ_by_one_layers_share() -> None:
    assert resolved(layers=[3, 5, 7, 9], ratio=0.1).layers == (3, 5, 7, 9)


def test_without_a_profile_the_layers_are_evenly_spaced_and_leave_out_both_ends() -> None:
    config = resolved(UNKNOWN, ratio=0.3, calibrate_seconds=0)
    assert len(config.layers) == 14
    assert min(config.layers) >= 3
    assert max(config.layers) <= 27
    gaps = {b - a for a, b in zip(config.layers, config.layers[1:], strict=False)}
    assert gaps <= {1, 2}
    assert not config.measured
    assert config.source == "even spacing, not measured: --orthorank-calibrate-seconds is 0"
    assert "`orthorank calibrate`" in config.remedy
    assert OrthoRankConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_a_profile_file_gives_its_first_layers(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    Profile("mine", UNKNOWN, (9, 4, 2, 8), keep=1 / 3, window=128).write(path)
    config = resolved(UNKNOWN, ratio=0.06, profile=str(path))
    assert config.layers == (2, 4, 9)
    assert config.source == "profile mine"


def test_a_resolved_configuration_survives_the_way_to_a_worker() -> None:
    config = resolved(ratio=0.3, keep=0.25, window=0)
    assert OrthoRankConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_without_a_profile_the_layers_are_left_to_a_calibration_at_start_up() -> None:
    config = resolved(UNKNOWN, ratio=0.3)
    assert (config.to_choose, config.layers, config.calibrate_seconds) == (14, (), 60)
    assert OrthoRankConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_a_ratio_past_the_shipped_profile_is_calibrated_too() -> None:
    assert resolved(ratio=0.5).to_choose == 23
    with pytest.raises(OptionError, match="profile SmolLM2-135M-Instruct ranks 14"):
        resolved(ratio=0.5, calibrate_seconds=0)


def test_a_profile_given_by_hand_that_ranks_too_few_layers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    Profile("mine", UNKNOWN, (9, 4), keep=1 / 3, window=128).write(path)
    with pytest.raises(OptionError, match=r"--orthorank-profile .* profile mine ranks 2"):
        resolved(UNKNOWN, ratio=0.3, profile=str(path))


def test_where_a_profile_was_measured_here_the_choice_waits_for_the_weights(tmp_path: Path) -> None:
    """Whose it is, the weights tell; before them goes neither it nor the shipped one."""
    Profile("mine", SMOLLM2, (9, 4), keep=1 / 3, window=128, weights="a" * 64).write(
        cached_path(tmp_path, "5" * 64, "a" * 64, 1 / 3, 128)
    )
    options = Options.from_mapping({"ratio": 0.3, "calibrate_seconds": 0})
    waiting = resolve(options, SMOLLM2, str(tmp_path))
    assert (waiting.to_choose, waiting.layers, waiting.calibrate_seconds) == (14, (), 0)
    options = Options.from_mapping({"ratio": 0.3, "window": 64})
    assert resolve(options, SMOLLM2, str(tmp_path)).source == "profile SmolLM2-135M-Instruct"


def test_a_start_without_weights_measures_nothing_and_takes_nothing_kept(tmp_path: Path) -> None:
    """Break seen: a server of random weights that calibrated on them."""
    for model in (SMOLLM2, UNKNOWN):
        Profile("mine", model, tuple(range(20)), 1 / 3, 128, weights="a" * 64).write(
            cached_path(tmp_path, "5" * 64, "a" * 64, 1 / 3, 128)
        )
        options = Options.from_mapping({"ratio": 0.3})
        config = resolve(options, model, str(tmp_path), has_weights=False)
        assert (config.to_choose, len(config.layers)) == (0, 14)
        assert config.measured == (model is SMOLLM2)
    assert config.source == "even spacing, not measured: this load format loads no weights"
    assert "--orthorank-profile" in config.remedy
    assert "seconds" not in config.remedy
    options = Options.from_mapping({"ratio": 0.5})
    assert not resolve(options, SMOLLM2, str(tmp_path), has_weights=False).measured


def test_a_profiles_weights_go_with_its_layers() -> None:
    measured_on = resolved(ratio=0.3).measured_on
    assert len(measured_on) == 64
    assert resolved(layers="7,26").measured_on == ""


def test_a_profile_measured_with_another_keep_says_so() -> None:
    source = resolved(ratio=0.3, keep=0.25).source
    assert source == "profile SmolLM2-135M-Instruct (measured with keep 0.333)"


def with_lookups(lookups: list[float | None]) -> Profile:
    return Profile(
        name="mine", model=SMOLLM2, order=(5, 4, 6), keep=1 / 3, window=128, lookups=tuple(lookups)
    )


@pytest.mark.parametrize(
    ("lookups", "said"),
    [
        ([], "has not measured whether the model still finds things"),
        ([None, None, 1.0], "has not measured whether the model still finds things"),
        ([None, 0.04], "finds 4% of the numbers in a list"),
    ],
)
def test_a_start_says_what_becomes_of_look_ups(lookups: list[float | None], said: str) -> None:
    config = replace(resolved(layers=[0]), to_choose=2).with_profile(with_lookups(lookups))
    assert said in config.describe_lookups()


def test_a_start_says_nothing_of_look_ups_that_are_found() -> None:
    config = replace(resolved(layers=[0]), to_choose=2).with_profile(with_lookups([1.0, 0.95]))
    assert config.describe_lookups() == ""


def test_look_ups_measured_with_another_rule_say_nothing() -> None:
    other = replace(resolved(layers=[0]), to_choose=2, keep=0.5)
    assert other.with_profile(with_lookups([1.0, 1.0])).lookups is None


def test_layers_given_by_hand_are_not_said_to_find_things() -> None:
    assert "has not measured" in resolved(layers=[7, 26]).describe_lookups()
