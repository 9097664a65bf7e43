"""What a start-up says of its layers, and when it warns."""

from dataclasses import replace

from orthorank_vllm.options import LayerKeep
from orthorank_vllm.profiles import Entry, Profile
from orthorank_vllm.start_lines import start_up_line, warning
from tests.test_config import CONFIG, ENTRIES, cost, profile, with_ratio, without_costs


def test_the_start_up_line_tells_what_more_may_be_asked_for() -> None:
    assert (
        "ratio 0.200 (asked for 0.2), window 128, tail 64, 2 of 10 layers selective [9:0,8:0] and "
        "up to 0.375 by request [3:0.25,7:0], chosen by profile mine"
    ) in start_up_line(with_ratio(0.2, max_ratio=0.3))


def test_nothing_is_said_of_layers_that_cost_little() -> None:
    assert warning(with_ratio(0.275)) == ""
    assert warning(with_ratio(0.375)) == ""


def test_a_start_warns_of_what_costs_much_and_says_what_would_not() -> None:
    assert warning(with_ratio(0.475)) == (
        "OrthoRank expects answers to lose prose 0.250, copy 0.100 nats a token; 50% of numbers "
        "found at this ratio, more than 0.1 nats on the worst kind of text or more than 5% of the "
        "look-ups: --orthorank-ratio 0.375 keeps them."
    )


def test_a_start_warns_of_look_ups_that_are_lost_where_the_loss_is_small() -> None:
    forgetful = profile(ENTRIES[0], Entry(5, 0.0, cost(0.001, 0.94)))
    config = replace(CONFIG, ratio_asked=0.2).with_profile(forgetful)
    assert "94% of numbers found" in warning(config)
    assert warning(config).endswith("--orthorank-ratio 0.1 keeps them.")


def test_the_advised_ratio_is_one_that_gives_just_those_entries() -> None:
    """Guards against: 0.13333 rounded up, which takes one layer more."""
    config = replace(CONFIG, num_layers=15, ratio_asked=0.2)
    model = {"num_hidden_layers": 15}
    three = Profile(
        "mine",
        model,
        (*ENTRIES[:2], Entry(5, 0.0, cost(0.4))),
        window=128,
        tail=64,
    )
    assert warning(config.with_profile(three)).endswith("--orthorank-ratio 0.1333 keeps them.")
    assert replace(config, ratio_asked=0.1333).entries_needed(three) == 2


def test_where_no_ratio_keeps_them_the_advice_is_none() -> None:
    config = CONFIG.with_profile(profile(*(replace(e, held_back=cost(0.5)) for e in ENTRIES)))
    assert warning(config).endswith("give --orthorank-ratio 0.")


def test_of_layers_without_figures_a_start_says_that_nobody_knows() -> None:
    by_hand = CONFIG.with_layers([LayerKeep(7, 0.0)], "--orthorank-layers")
    assert by_hand.measured
    for config in (by_hand, CONFIG.with_profile(without_costs())):
        assert warning(config).startswith("OrthoRank does not know what answers lose")
