"""The greedy choice, on losses that can be written down."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orthorank_vllm.calibrate.greedy import Choice, NothingToTell, OutOfTime, choose, choose_within


class Losses:
    """A trial whose loss is a sum of the layers' costs and of what pairs cost together."""

    def __init__(
        self, costs: Sequence[float], pairs: dict[frozenset[int], float] | None = None
    ) -> None:
        self.costs = costs
        self.pairs = pairs or {}
        self.chosen: tuple[int, ...] = ()
        self.last = -1
        self.tried: list[int] = []

    def start_step(self, chosen: Sequence[int]) -> None:
        self.chosen = tuple(chosen)
        self.last = -1

    def loss_with(self, layer: int | None) -> float:
        layers = set(self.chosen)
        if layer is not None:
            assert layer > self.last, "layers must be tried in ascending order"
            self.last = layer
            self.tried.append(layer)
            layers.add(layer)
        together = sum(cost for pair, cost in self.pairs.items() if pair <= layers)
        return 3.0 + sum(self.costs[layer] for layer in layers) + together


class Clock:
    """Time that passes with each trial."""

    def __init__(self, losses: Losses, seconds_per_trial: float) -> None:
        self.losses = losses
        self.seconds_per_trial = seconds_per_trial

    def __call__(self) -> float:
        return len(self.losses.tried) * self.seconds_per_trial


def chosen(losses: Losses, count: int, breadth: int | None = None) -> Choice:
    choice = Choice(len(losses.costs))
    choose(losses, choice, count, breadth=breadth)
    return choice


def within_time(losses: Losses, choice: Choice, count: int) -> None:
    choose_within(losses, choice, count, seconds=100, clock=lambda: 0.0)


def test_layers_that_are_cheap_alone_and_dear_together_are_not_both_taken() -> None:
    losses = Losses([0.1, 0.1, 0.5, 0.6], {frozenset({0, 1}): 1.0})
    assert chosen(losses, 3).order == [0, 2, 3]


def test_each_loss_is_the_one_with_all_layers_up_to_it() -> None:
    choice = chosen(Losses([0.3, 0.1, 0.2]), 2)
    assert choice.dense_loss == 3.0
    assert choice.losses == pytest.approx([3.1, 3.3])


def test_the_lower_layer_wins_a_tie() -> None:
    assert chosen(Losses([0.2, 0.1, 0.1, 0.1]), 2).order == [1, 2]


def test_a_loss_that_is_not_a_number_never_wins() -> None:
    assert chosen(Losses([math.nan, 0.5, 0.2]), 2).order == [2, 1]


def test_a_model_no_better_than_chance_tells_nothing_and_no_layer_is_tried() -> None:
    losses = Losses([0.1, 0.2])
    for run in (choose, within_time):
        with pytest.raises(NothingToTell, match=r"loss, 3 nats a token, .* chance, 2\.99"):
            run(losses, Choice(2, chance=2.99), 1)
    assert losses.tried == []
    assert chosen(losses, 1).order == [0]


def test_a_dense_loss_that_is_not_a_number_tells_nothing() -> None:
    losses = Losses([0.1, 0.2])
    choice = Choice(2, dense_loss=math.nan)
    with pytest.raises(NothingToTell, match="nan nats"):
        choose(losses, choice, 1)


@pytest.mark.parametrize("costs", [[0.1] * 4, [0.1, 0.100001, 0.1, 0.1], [math.nan] * 4])
def test_layers_that_all_cost_the_same_tell_nothing(costs: list[float]) -> None:
    """Break seen: layers 0 to 13 of random weights, by the rule for ties."""
    for run in (choose, within_time):
        with pytest.raises(NothingToTell, match=r"any of its 4 layers selective .* same"):
            run(Losses(costs), Choice(4), 2)


def test_a_model_of_one_layer_has_nothing_to_compare() -> None:
    assert chosen(Losses([0.1]), 1).order == [0]


def test_after_the_first_step_a_breadth_tries_only_the_cheapest() -> None:
    losses = Losses([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    choice = chosen(losses, 3, breadth=2)
    assert choice.order == [0, 1, 2]
    assert losses.tried == [0, 1, 2, 3, 4, 5, 1, 2, 2, 3]


def test_a_layer_is_not_taken_for_what_it_cost_in_an_earlier_step() -> None:
    """Break seen: a layer chosen untried, because those tried had become dearer than it was."""
    pairs = {frozenset({0, layer}): 1.0 for layer in (1, 2, 3)}
    losses = Losses([0.1, 0.2, 0.3, 0.4, 0.5], pairs)
    choice = chosen(losses, 2, breadth=2)
    assert choice.order == [0, 1]
    assert choice.losses == pytest.approx([3.1, 4.3])


# Not all the same: such tell nothing.
COSTS = st.lists(st.floats(0, 1, allow_nan=False), min_size=2, max_size=7).filter(
    lambda costs: max(costs) - min(costs) > 1e-3
)


@given(COSTS, st.data())
def test_a_choice_stopped_at_any_trial_goes_on_to_the_same_end(
    costs: list[float], data: st.DataObject
) -> None:
    """Break seen: a resumed step that ranked only the layers tried after the stop."""
    pairs = {
        frozenset({a, b}): data.draw(st.floats(0, 1)) for a in range(len(costs)) for b in range(a)
    }
    count = data.draw(st.integers(1, len(costs)))
    whole = chosen(Losses(costs, pairs), count)

    stop_after = data.draw(st.integers(1, whole.trials))
    stopped = Choice(len(costs))
    made = 0

    def on_trial() -> None:
        nonlocal made
        made += 1
        if made == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        choose(Losses(costs, pairs), stopped, count, on_trial)
    left = Choice(  # what a profile keeps
        len(costs),
        stopped.dense_loss,
        list(stopped.order),
        list(stopped.losses),
        dict(stopped.tried),
        trials=stopped.trials,
    )
    choose(Losses(costs, pairs), left, count)
    assert (left.order, left.losses, left.trials) == (whole.order, whole.losses, whole.trials)


@given(COSTS, st.floats(0.1, 3), st.floats(0.1, 60))
def test_within_a_time_it_ends_in_time_with_all_layers_or_says_that_it_cannot(
    costs: list[float], pace: float, seconds: float
) -> None:
    losses = Losses(costs)
    choice = Choice(len(costs))
    clock = Clock(losses, pace)
    try:
        choose_within(losses, choice, len(costs) - 1, seconds, clock)
    except OutOfTime:
        assert seconds < (len(costs) + 1) * pace
    else:
        assert len(choice.order) == len(costs) - 1
        assert len(set(choice.order)) == len(choice.order)
    assert clock() <= max(seconds, pace)


def test_where_time_runs_out_the_cheapest_by_the_last_try_are_taken_untried() -> None:
    losses = Losses([0.4, 0.1, 0.3, 0.2, 0.5])
    choice = Choice(5)
    choose_within(losses, choice, 4, seconds=6.5, clock=Clock(losses, 1.0))
    assert choice.order == [1, 3, 2, 0]
    assert choice.losses[0] == pytest.approx(3.1)
    assert choice.losses[-1] is None


def test_with_time_enough_it_chooses_as_without_a_limit() -> None:
    pairs = {frozenset({0, 1}): 1.0, frozenset({2, 3}): 0.4}
    costs = [0.1, 0.1, 0.15, 0.2, 0.3]
    choice = Choice(5)
    choose_within(Losses(costs, pairs), choice, 4, seconds=1e9)
    assert choice.order == chosen(Losses(costs, pairs), 4).order


def test_a_choice_goes_on_from_layers_that_are_known() -> None:
    choice = Choice(4, order=[2], losses=[None])
    choose_within(Losses([0.3, 0.2, 0.1, 0.4]), choice, 3, seconds=1e9)
    assert choice.order == [2, 1, 0]


def test_a_choice_that_goes_on_with_a_breadth_first_tries_every_layer_again() -> None:
    """Break seen: the layers with the lowest indices taken for the cheapest."""
    choice = Choice(5, dense_loss=3.0, order=[2], losses=[3.1])
    losses = Losses([0.5, 0.4, 0.1, 0.3, 0.2])
    choose(losses, choice, 3, breadth=1)
    assert choice.order == [2, 4, 3]
    assert losses.tried == [0, 1, 3, 4, 3]
