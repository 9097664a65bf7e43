"""The search, on losses that can be written down."""

import math
from collections.abc import Mapping
from typing import Any

import pytest

from orthorank_vllm.calibrate.kinds import KINDS
from orthorank_vllm.calibrate.search import (
    CARRIES,
    DEAR,
    HALF,
    LEAST_TRIED,
    LUCK,
    LUCK_NATS,
    NOISE_SHARE,
    NONE,
    SIXTH,
    THIRD,
    TOGETHER,
    NothingToTell,
)
from tests.calibrate.written_losses import WrittenSearch, alternately, layers_cost, layers_of


def keeps_of(search: WrittenSearch) -> dict[int, float]:
    return {entry.layer: entry.keep for entry in search.search.entries}


def test_layers_that_are_cheap_alone_and_dear_together_are_not_both_taken() -> None:
    loss = layers_cost([0.2, 0.15, 0.1, 0.1, 0.3], {(2, 3): 1.0})
    assert layers_of(WrittenSearch(5, loss).run()) == [3, 1, 0, 4, 2]


def test_each_cost_is_that_of_all_layers_up_to_it() -> None:
    found = WrittenSearch(3, layers_cost([0.3, 0.1, 0.2]), layers_cost([0.4, 0.1, 0.2])).run()
    assert layers_of(found) == [1, 2, 0]
    costs = [entry.cost.loss["prose"] for entry in found if entry.cost]
    held_back = [entry.held_back.loss["chat"] for entry in found if entry.held_back]
    assert costs == pytest.approx([0.1, 0.3, 0.6])
    assert held_back == pytest.approx([0.1, 0.3, 0.7])
    assert all(entry.cost is not None and entry.cost.found == 1 for entry in found)


def test_the_later_layer_wins_a_tie() -> None:
    assert layers_of(WrittenSearch(4, layers_cost([0.2, 0.1, 0.1, 0.1])).run()) == [3, 2, 1, 0]


def test_of_layers_whose_difference_is_within_the_noise_the_last_is_taken() -> None:
    loss = layers_cost([0.1, 0.11, 0.4, 0.5])
    noisy = [{1: much} for much in alternately(0.05)]
    assert layers_of(WrittenSearch(4, loss, noise=noisy).run(0.25))[0] == 1
    assert layers_of(WrittenSearch(4, loss).run(0.25))[0] == 0
    # What all layers have alike is no noise in their difference.
    alike = [dict.fromkeys(range(4), much) for much in alternately(0.05)]
    assert layers_of(WrittenSearch(4, loss, noise=alike).run(0.25))[0] == 0


def test_however_large_the_noise_a_much_dearer_layer_is_not_taken_for_a_later_one() -> None:
    noisy = [{1: much} for much in alternately(5)]
    for dearer, taken in ((NOISE_SHARE * 0.9, 1), (NOISE_SHARE * 1.1, 0)):
        loss = layers_cost([0.1, 0.1 * (1 + dearer), 0.9, 0.9])
        assert layers_of(WrittenSearch(4, loss, noise=noisy).run(0.25))[0] == taken


def of_kinds(**costs: Mapping[int, float]) -> Any:
    """A loss of each kind, the sum of its layers'."""
    by_kind = {kind.replace("_", "-"): of_layer for kind, of_layer in costs.items()}

    def loss(chosen: Mapping[int, float]) -> dict[str, float]:
        return {
            kind: sum(of_layer[layer] * (1 - keep) for layer, keep in chosen.items())
            for kind, of_layer in by_kind.items()
        }

    return loss


@pytest.mark.parametrize("kind", ["look_up", "copy"])
def test_a_layer_that_carries_look_ups_or_copies_comes_after_all_others(kind: str) -> None:
    """Break seen: cheapest in the mean of all kinds, it was taken first."""
    cheap = dict.fromkeys(range(4), 0.0)
    much = {0: 0.5, 1: 0.4, 2: 0.05, 3: 0.5}
    kinds = {"prose": much, "look_up": cheap, "copy": cheap, "chat": much}
    carried = {**kinds, kind: {**cheap, 2: CARRIES * 1.1}}
    assert layers_of(WrittenSearch(4, of_kinds(**kinds), kinds=KINDS).run())[0] == 2
    assert layers_of(WrittenSearch(4, of_kinds(**carried), kinds=KINDS).run()) == [1, 3, 0, 2]


def test_where_some_tokens_are_enough_as_many_as_needed_are_computed() -> None:
    steps = {(1, HALF): 0.001, (1, THIRD): 0.0012, (1, SIXTH): 0.1}
    search = WrittenSearch(3, layers_cost([0.5, 0.3, 0.4], at_keeps=steps))
    search.run(0.1)
    assert search.search.entries[0].layer_keep == (1, THIRD)
    tried = [chosen[1] for name, chosen in search.tried if name == "here" and set(chosen) == {1}]
    assert tried == [NONE, HALF, THIRD, SIXTH]


@pytest.mark.parametrize(
    ("steps", "keep"),
    [
        ({HALF: 0.001, THIRD: 0.1, SIXTH: 0.0}, HALF),
        ({HALF: 0.001, THIRD: 0.0013, SIXTH: 0.0014}, SIXTH),
        ({HALF: 0.16, THIRD: 0.0, SIXTH: 0.0}, NONE),
    ],
)
def test_a_keep_is_lowered_while_that_is_better_for_what_it_saves(
    steps: dict[float, float], keep: float
) -> None:
    at_keeps = {(1, keep): cost for keep, cost in steps.items()}
    search = WrittenSearch(3, layers_cost([0.5, 0.3, 0.4], at_keeps=at_keeps))
    search.run(0.1)
    assert search.search.entries[0].layer_keep == (1, keep)


def test_of_keeps_whose_difference_is_within_the_noise_the_lowest_is_taken() -> None:
    loss = layers_cost([0.5, 0.3, 0.4], at_keeps={(1, HALF): 0.148, (1, THIRD): 9, (1, SIXTH): 9})
    noisy = [{1: much} for much in alternately(0.05)]
    for noise, keep in ((noisy, NONE), ([], HALF)):
        search = WrittenSearch(3, loss, noise=noise)
        assert search.run(0.1)[0].layer_keep == (1, keep)


def test_keeps_are_tried_where_a_layer_is_dear_and_where_the_method_has_any() -> None:
    costs = [0.5, 0.4, DEAR * 0.4 * 0.9, 0.4]
    search = WrittenSearch(4, layers_cost(costs))
    search.run(0.1)
    halved = [list(chosen) for chosen in search.trials["scout"].tried if HALF in chosen.values()]
    assert halved == [[0], [1], [3]]

    whole = WrittenSearch(4, layers_cost(costs, at_keeps={(1, HALF): 0.0}), tries_keeps=False)
    whole.run()
    assert set(keeps_of(whole).values()) == {NONE}
    assert {keep for _, chosen in whole.tried for keep in chosen.values()} == {NONE}


@pytest.mark.parametrize(("share", "together"), [(TOGETHER * 0.9, True), (TOGETHER * 1.1, False)])
def test_two_layers_are_taken_at_once_where_their_costs_add_up(
    share: float, together: bool
) -> None:
    costs = [0.5, 0.4, 0.2, 0.1, 0.6, 0.7]
    search = WrittenSearch(6, layers_cost(costs, {(2, 3): 0.2 * (share - 1)}))
    assert layers_of(search.run(0.3))[:2] == [3, 2]
    in_steps = [set(chosen) for chosen in search.trials["here"].tried if len(chosen) == 2]
    assert in_steps[0] == {3, 2}
    assert (len(in_steps) == 1) == together


def test_the_second_of_two_is_the_best_beside_what_was_chosen_before() -> None:
    """Break seen: what it adds counted from the loss with the first."""
    loss = layers_cost([0.4, 0.26, 0.5, 0.2], at_keeps={(0, HALF): 0.14})
    assert layers_of(WrittenSearch(4, loss).run(0.3))[:2] == [3, 1]


def test_a_layer_that_the_held_back_text_speaks_against_comes_after_all_others() -> None:
    here = [0.4, 0.3, 0.1, 0.5]
    for there, order in (
        (LUCK * 0.1 + LUCK_NATS * 0.9, [2, 1, 0, 3]),
        (LUCK * 0.1 + LUCK_NATS * 1.1, [1, 0, 3, 2]),
    ):
        held_back = layers_cost([0.4, 0.3, there, 0.5])
        assert layers_of(WrittenSearch(4, layers_cost(here), held_back).run()) == order


def test_the_held_back_text_cannot_speak_for_a_layer() -> None:
    here = layers_cost([0.4, 0.3, 0.1, 0.5])
    nothing = layers_cost([0.0] * 4)
    assert layers_of(WrittenSearch(4, here, nothing).run()) == [2, 1, 0, 3]


def test_layers_that_do_better_than_dense_together_are_taken() -> None:
    """Break seen: none was as good as the best, which added less than nothing."""
    loss = layers_cost([0.5, 0.2, 0.1, 0.4], {(1, 2): -0.25})
    assert layers_of(WrittenSearch(4, loss).run()) == [2, 1, 3, 0]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_never_wins(loss: float) -> None:
    search = WrittenSearch(4, layers_cost([0.5, 0.3, 0.4, loss]))
    found = search.run()
    assert layers_of(found) == [1, 2, 0, 3]
    assert found[-1].cost is not None
    assert math.isfinite(found[-1].cost.worst)


def test_a_broken_layer_is_not_taken_for_what_one_kind_alone_loses() -> None:
    broken = {0: 0.01, 1: math.nan, 2: 0.04}
    fine = {0: 0.01, 1: 0.0, 2: 0.04}
    loss = of_kinds(prose=broken, look_up=fine, copy=fine, chat=fine)
    assert layers_of(WrittenSearch(3, loss, kinds=KINDS).run()) == [0, 2, 1]


def test_only_the_few_sets_that_look_best_are_measured() -> None:
    search = WrittenSearch(12, layers_cost([1 + 0.1 * layer for layer in range(12)]))
    search.run(0.05)
    assert [list(chosen) for chosen in search.trials["scout"].tried[:12]] == [
        [layer] for layer in range(12)
    ]
    first = search.trials["here"].tried[:LEAST_TRIED]
    assert sorted(layer for chosen in first for layer in chosen) == list(range(LEAST_TRIED))


def test_layers_are_tried_in_the_order_of_what_they_added_when_last_measured() -> None:
    # Cheap alone, dear beside any other.
    dear = (6, 7, 8)
    pairs = {(layer, other): 1.0 for layer in dear for other in range(10) if other not in dear}
    costs = [0.36, 0.34, 0.33, 0.32, 0.31, 0.3, 0.2, 0.2, 0.2, 0.1]
    search = WrittenSearch(10, layers_cost(costs, pairs), tries_keeps=False)
    assert layers_of(search.run(0.3))[:3] == [9, 5, 4]
    tried = [set(chosen) for chosen in search.trials["here"].tried]
    third_step = [chosen - {9, 5} for chosen in tried if len(chosen) == 3 and {9, 5} < chosen]
    assert third_step == [{2}, {3}, {4}]


def test_a_model_no_better_than_chance_tells_nothing_and_no_layer_is_tried() -> None:
    for dense_loss, told in ((3.0, "3"), (math.nan, "nan"), (math.inf, "inf")):
        search = WrittenSearch(4, layers_cost([0.1, 0.2, 0.3, 0.4]), dense_loss=dense_loss)
        with pytest.raises(NothingToTell, match=rf"loss, {told} nats a token, .* chance, 2\.99"):
            search.run(chance=2.99)
        assert search.tried == []


@pytest.mark.parametrize("costs", [[0.1] * 4, [0.1, 0.10001, 0.1, 0.1], [0.0] * 4])
def test_layers_that_all_cost_the_same_tell_nothing(costs: list[float]) -> None:
    """Break seen: layers of random weights, by the rule for ties."""
    with pytest.raises(NothingToTell, match=r"any of its 4 layers selective"):
        WrittenSearch(4, layers_cost(costs)).run()


def test_a_model_of_one_layer_has_nothing_to_compare() -> None:
    assert layers_of(WrittenSearch(1, layers_cost([0.1])).run()) == [0]


def test_each_entry_is_told() -> None:
    search = WrittenSearch(4, layers_cost([0.4, 0.3, 0.1, 0.5]))
    told: list[float] = []
    search.search.on_entry = lambda: told.append(search.search.ratio)
    search.run()
    assert told == pytest.approx([0.25, 0.5, 0.75, 1.0])
