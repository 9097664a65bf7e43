"""What is run: a profile's first entries, what they are expected to cost, how workers are told."""

import json
from dataclasses import replace
from typing import Any

import pytest

from orthorank_vllm.config import CALIBRATION_OFF, OrthoRankConfig
from orthorank_vllm.options import LayerKeep, OptionError
from orthorank_vllm.profiles import Cost, Entry, Profile
from orthorank_vllm.start_lines import start_up_line, warning

THIRD = 1 / 3
MODEL = {"num_hidden_layers": 10}
CONFIG = OrthoRankConfig(ratio_asked=0.25, window=128, tail=64, num_layers=10)
AUTO = replace(CONFIG, ratio_asked=None, max_loss=0.02)


def cost(loss: float, found: float | None = None, **more: float) -> Cost:
    return Cost({"prose": loss, **more}, found)


# Ratios 0.1, 0.2, 0.275, 0.375 and 0.475.
ENTRIES = (
    Entry(9, 0.0, cost(0.0), cost(0.0, 1.0)),
    Entry(8, 0.0, cost(0.001), cost(0.004, 1.0, copy=0.019)),
    Entry(3, 0.25, cost(0.002), cost(0.03, 0.97, copy=0.005)),
    Entry(7, 0.0, cost(0.01), cost(0.02, 0.96, copy=0.01)),
    Entry(6, 0.0, cost(0.3), cost(0.25, 0.5, copy=0.1)),
)


def profile(*entries: Entry, **changed: Any) -> Profile:
    fields: dict[str, Any] = {"window": 128, "tail": 64, "weights": "a" * 64, **changed}
    return Profile("mine", MODEL, entries or ENTRIES, **fields)


def without_costs() -> Profile:
    return profile(*(Entry(entry.layer, entry.keep) for entry in ENTRIES))


def with_ratio(ratio: float, **changed: Any) -> OrthoRankConfig:
    return replace(CONFIG, ratio_asked=ratio, **changed).with_profile(profile())


@pytest.mark.parametrize(
    ("ratio", "count"),
    [(0.001, 1), (0.1, 1), (0.101, 2), (0.2, 2), (0.25, 3), (0.275, 3), (0.276, 4), (0.475, 5)],
)
def test_entries_are_taken_from_the_front_until_the_ratio_is_reached(
    ratio: float, count: int
) -> None:
    """Guards against: the count that comes nearest."""
    config = with_ratio(ratio)
    assert config.layers == tuple(entry.layer_keep for entry in ENTRIES[:count])
    assert config.ratio >= ratio - 1e-9


def test_the_ratio_reached_is_what_is_reported() -> None:
    config = with_ratio(0.25)
    assert config.ratio == pytest.approx(0.275)
    assert start_up_line(config) == (
        "OrthoRank is active: ratio 0.275 (asked for 0.25), window 128, tail 64, 3 of 10 layers "
        "selective [9:0,8:0,3:0.25], chosen by profile mine, expected loss prose 0.030, copy 0.005 "
        "nats a token; 97% of numbers found"
    )


def test_more_than_the_profile_has_is_all_of_it_and_known_beforehand() -> None:
    config = replace(CONFIG, ratio_asked=0.5)
    assert config.entries_needed(profile()) is None
    assert len(config.with_profile(profile()).layers) == 5


def test_a_keep_by_hand_is_every_layers_and_makes_the_profiles_costs_unknown() -> None:
    config = with_ratio(0.25, keep=THIRD)
    assert config.layers == tuple(LayerKeep(layer, THIRD) for layer in (9, 8, 3, 7))
    assert config.keeps == (THIRD,) * 4
    assert config.expected is None
    assert config.measured_on == "a" * 64


@pytest.mark.parametrize("changed", [{"window": 0}, {"tail": 1}])
def test_another_rule_makes_the_profiles_costs_unknown(changed: dict[str, int]) -> None:
    config = with_ratio(0.25, **changed)
    assert len(config.layers) == 3
    assert (config.expected, config.advised) == (None, None)


def test_what_is_expected_is_the_last_entrys_cost_on_held_back_text() -> None:
    """Guards against: that of the text which the layers were chosen on."""
    assert with_ratio(0.25).expected == ENTRIES[2].held_back
    chosen_on = profile(*(replace(entry, held_back=None) for entry in ENTRIES))
    assert CONFIG.with_profile(chosen_on).expected == ENTRIES[2].cost
    assert CONFIG.with_profile(without_costs()).expected is None


@pytest.mark.parametrize(
    ("max_loss", "count"), [(0.0, 1), (0.01, 1), (0.019, 2), (0.02, 4), (9, 5)]
)
def test_auto_takes_the_most_entries_that_lose_little_on_the_worst_kind(
    max_loss: float, count: int
) -> None:
    """Guards against: the mean of the kinds; up to the first entry that loses more."""
    config = replace(AUTO, max_loss=max_loss).with_profile(profile())
    assert config.layers == tuple(entry.layer_keep for entry in ENTRIES[:count])
    assert config.expected == ENTRIES[count - 1].held_back
    assert warning(config) == ""
    assert f"(auto: at most {max_loss:.3g} nats lost)" in start_up_line(config)


@pytest.mark.parametrize(
    "unfit", [without_costs(), profile(window=64), profile(tail=1)], ids=["costs", "window", "tail"]
)
def test_auto_needs_figures_of_what_is_run(unfit: Profile) -> None:
    """Guards against: another tail's figures; no figures, and so silently no layer."""
    assert AUTO.entries_needed(unfit) is None
    config = AUTO.with_profile(unfit)
    assert config.layers == ()
    assert not config.measured


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 0), (0.001, 1), (0.2, 2), (0.25, 3), (0.4, 5)])
def test_the_layers_are_those_of_the_largest_ratio_and_the_first_ones_the_default(
    ratio: float, count: int
) -> None:
    config = with_ratio(ratio, max_ratio=0.4)
    assert config.layers == tuple(entry.layer_keep for entry in ENTRIES)
    assert config.default_layers == config.layers[:count] == with_ratio(ratio).layers[:count]
    assert config.ratio == pytest.approx([0, 0.1, 0.2, 0.275, 0.375, 0.475][count])
    assert config.expected == (ENTRIES[count - 1].held_back if count else None)
    assert [config.num_for(each) for each in (0, 0.05, 0.1, 0.2001, 0.375, 0.4, 0.9)] == [
        *(0, 1, 1, 3, 4, 5, 5),
    ]


def test_auto_beside_a_largest_ratio_loads_that_ones_layers() -> None:
    config = replace(AUTO, max_ratio=0.475).with_profile(profile())
    assert (len(config.layers), config.num_default) == (5, 4)
    assert config.expected == ENTRIES[3].held_back
    bounded = replace(AUTO, max_ratio=0.2).with_profile(profile())
    assert (len(bounded.layers), bounded.num_default) == (2, 2)
    assert replace(AUTO, max_ratio=0.475).with_profile(without_costs()).layers == ()
    assert replace(AUTO, max_ratio=0.475).entries_needed(without_costs()) is None
    assert replace(AUTO, max_ratio=0.9).entries_needed(profile()) is None


def test_unmeasured_layers_reach_the_largest_ratio_too() -> None:
    config = replace(CONFIG, max_ratio=0.5).unmeasured(*CALIBRATION_OFF)
    assert [layer for layer, _ in config.layers] == [9, 8, 7, 6, 5]
    assert config.num_default == 3
    with pytest.raises(OptionError, match=r"--orthorank-max-ratio 0\.51"):
        replace(CONFIG, max_ratio=0.51).unmeasured("", "help")


def test_auto_that_can_take_no_layer_says_so() -> None:
    lossy = profile(Entry(3, 0.0, cost(0.5)))
    assert AUTO.entries_needed(lossy) == 0
    config = AUTO.with_profile(lossy)
    assert (config.layers, config.ratio, warning(config)) == ((), 0, "")
    assert config.source == "nothing: by profile mine no layer can be selective at a loss of 0.02"
    assert "--orthorank-max-loss" in config.remedy


def test_layers_and_their_keeps_stay_in_the_order_given() -> None:
    layers = [LayerKeep(7, 0.25), LayerKeep(2, 0.0), LayerKeep(5, 0.25)]
    config = CONFIG.with_layers(layers, "--orthorank-layers")
    assert config.layers == tuple(layers)
    assert config.keeps == (0.25, 0.0, 0.25)
    assert config.ratio == pytest.approx(0.25)


def test_without_a_measurement_the_last_layers_are_taken_and_said_to_be_a_guess() -> None:
    config = CONFIG.unmeasured(*CALIBRATION_OFF)
    assert config.layers == (LayerKeep(9, 0.0), LayerKeep(8, 0.0), LayerKeep(7, 0.0))
    assert config.source == "the last layers, not measured: --orthorank-calibrate-seconds is 0"
    assert not config.measured
    assert "`orthorank calibrate`" in config.remedy
    thirds = replace(CONFIG, keep=THIRD).unmeasured(*CALIBRATION_OFF)
    assert thirds.layers == tuple(LayerKeep(layer, THIRD) for layer in (9, 8, 7, 6))


def test_a_count_of_unmeasured_layers_that_is_whole_is_not_rounded_up() -> None:
    """Guards against: 0.3 x 10 is 3.0000000000000004 with some numbers."""
    for tenths in range(1, 6):
        config = replace(CONFIG, ratio_asked=sum([0.1] * tenths)).unmeasured("", "help")
        assert len(config.layers) == tenths


def test_more_layers_than_an_unmeasured_model_may_lose_is_an_error() -> None:
    config = replace(CONFIG, ratio_asked=0.51)
    with pytest.raises(OptionError) as raised:
        config.unmeasured("5 s were too few", "give --orthorank-calibrate-seconds 70 or more")
    assert str(raised.value) == (
        "--orthorank-ratio 0.51: not allowed, it needs 6 selective layers, and of layers that are "
        "not measured (5 s were too few) only the last 5 of this model's 10 may be; give "
        "--orthorank-calibrate-seconds 70 or more"
    )


def test_auto_without_a_measurement_is_dense() -> None:
    config = AUTO.unmeasured(*CALIBRATION_OFF)
    assert config.layers == ()
    assert config.source == "nothing: --orthorank-calibrate-seconds is 0"
    assert not config.measured


@pytest.mark.parametrize(
    "config",
    [
        with_ratio(0.25),
        with_ratio(0.475, keep=THIRD, window=0, tail=1),
        with_ratio(0.1, max_ratio=0.3),
        CONFIG.with_profile(without_costs()),
        AUTO.with_profile(profile()),
        AUTO.unmeasured(*CALIBRATION_OFF),
        CONFIG.unmeasured(*CALIBRATION_OFF),
        replace(CONFIG, to_choose=True, calibrate_seconds=300.0),
        CONFIG.with_layers([LayerKeep(7, THIRD), LayerKeep(2, 0.0)], "--orthorank-layers"),
    ],
)
def test_a_configuration_survives_the_way_to_a_worker(config: OrthoRankConfig) -> None:
    as_dict = config.as_dict()
    assert OrthoRankConfig.from_dict(as_dict) == config
    through_json = OrthoRankConfig.from_dict(json.loads(json.dumps(as_dict)))
    assert through_json == config
    assert all(type(layer) is LayerKeep for layer in through_json.layers)
