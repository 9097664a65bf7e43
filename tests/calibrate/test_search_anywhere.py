"""Searches on any losses: to any ratio, stopped anywhere, gone on."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orthorank_vllm.calibrate.measured import key_of
from orthorank_vllm.calibrate.search import KEEPS
from orthorank_vllm.config import ratio_of
from tests.calibrate.written_losses import WrittenSearch, alternately, layers_cost, layers_of

# Not all the same: such tell nothing.
COSTS = st.lists(st.floats(0, 1), min_size=2, max_size=7).filter(
    lambda costs: max(costs) - min(costs) > 1e-3
)


@st.composite
def searches(draw: st.DrawFn) -> dict[str, Any]:
    """What a `WrittenSearch` is made of, pairs and luck and noise in it."""
    costs = draw(COSTS)
    num_layers = len(costs)

    def losses(of_layers: list[float]) -> Any:
        pairs = {(a, b): draw(st.floats(-0.3, 0.6)) for b in range(num_layers) for a in range(b)}
        at_keeps = {
            (layer, keep): draw(st.floats(0, 0.5))
            for layer in range(num_layers)
            for keep in KEEPS[1:]
        }
        return layers_cost(of_layers, pairs, at_keeps)

    scales = draw(st.lists(st.floats(0, 0.2), min_size=num_layers, max_size=num_layers))
    return {
        "num_layers": num_layers,
        "here": losses(costs),
        "scout": losses(costs),
        "held_back": losses(draw(st.lists(st.floats(0, 3), min_size=num_layers, max_size=7))),
        "noise": [
            {layer: sign * scale for layer, scale in enumerate(scales)} for sign in alternately(1)
        ],
    }


def run(made_of: dict[str, Any], max_ratio: float = 1.0, **more: Any) -> WrittenSearch:
    search = WrittenSearch(**made_of, **more)
    search.run(max_ratio)
    return search


@settings(deadline=None)
@given(searches())
def test_every_layer_is_chosen_once_in_the_end(made_of: dict[str, Any]) -> None:
    search = run(made_of)
    assert sorted(layers_of(search.search.entries)) == list(range(made_of["num_layers"]))
    for name, trial in search.trials.items():
        keys = [key_of(chosen.items()) for chosen in trial.tried]  # type: ignore[arg-type]
        assert len(set(keys)) == len(keys), name


@settings(deadline=None)
@given(searches(), st.floats(0.01, 0.99))
def test_a_search_to_a_lower_ratio_is_the_beginning_of_one_to_a_higher(
    made_of: dict[str, Any], ratio: float
) -> None:
    whole = run(made_of).search.entries
    found = run(made_of, ratio).search.entries
    assert found == whole[: len(found)]
    num_layers = made_of["num_layers"]
    reached = [
        ratio_of([entry.layer_keep for entry in found[:count]], num_layers)
        for count in range(len(found) + 1)
    ]
    # No more than needed, but for one that was taken beside another.
    assert len(found) == num_layers or reached[-1] > ratio - 1e-9
    assert len(found) < 3 or reached[-3] < ratio


@settings(deadline=None)
@given(searches())
def test_a_search_on_what_is_known_measures_nothing_and_finds_the_same(
    made_of: dict[str, Any],
) -> None:
    once = run(made_of)
    again = run(made_of, known=once)
    assert again.search.entries == once.search.entries
    assert again.tried == []


@settings(deadline=None, max_examples=40)
@given(searches(), st.data())
def test_a_search_stopped_at_any_trial_goes_on_to_the_same_end_and_measures_nothing_twice(
    made_of: dict[str, Any], data: st.DataObject
) -> None:
    whole = run(made_of)
    calls = 0
    stop_at = data.draw(st.integers(1, len(whole.tried) + len(whole.trials)))

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt

    stopped = WrittenSearch(**made_of, before_trial=stop)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    left = run(made_of, known=stopped)
    assert left.search.entries == whole.search.entries
    for name, trial in whole.trials.items():
        assert stopped.trials[name].tried + left.trials[name].tried == trial.tried
