"""Measurements: each made once, kept, and every kind of text counted alike."""

import json
import math
from collections.abc import Callable, Mapping

import pytest

from orthorank_vllm.calibrate.kinds import Sample
from orthorank_vllm.calibrate.measured import Losses, Measured, key_of
from orthorank_vllm.options import LayerKeep
from tests.calibrate.written_losses import DENSE_LOSS, WrittenTrial, layers_cost, samples_of

SAMPLES = [*samples_of(["prose"], 3), *samples_of(["copy"], 1)]
NUMBERS = (0.1, 0.2, 0.6, 0.9)
COSTS = layers_cost([0.1, 0.2, 0.3, 0.4])
LOSSES = Losses(NUMBERS, (1, 0, 1, 1))


def measured(
    loss: Callable[[Mapping[int, float]], float] = COSTS,
    before_trial: Callable[[], None] = lambda: None,
    samples: list[Sample] = SAMPLES,
) -> tuple[Measured, WrittenTrial]:
    trial = WrittenTrial(samples, loss)
    return Measured(samples, lambda: trial, before_trial), trial


def keeps(*layers: int) -> list[LayerKeep]:
    return [LayerKeep(layer, 0.0) for layer in layers]


def test_every_kind_of_text_counts_alike() -> None:
    each, _ = measured()
    assert each.kinds == ["prose", "copy"]
    assert each.by_kind(LOSSES) == pytest.approx({"prose": 0.3, "copy": 0.9})
    assert each.mean(LOSSES) == pytest.approx(0.6)


def test_the_standard_error_is_that_of_a_mean_of_means() -> None:
    each, _ = measured()
    # Of prose: variance 0.07 of three; a single copy tells nothing of it.
    assert each.standard_error(NUMBERS) == pytest.approx(math.sqrt(0.07 / 3) / 2)
    assert measured(samples=samples_of(each=1))[0].standard_error((0.1, 0.9)) == 0
    two = measured(samples=samples_of(each=2))[0]
    assert two.standard_error((0, 2, 0, 4)) == pytest.approx(math.sqrt(2 / 2 + 8 / 2) / 2)


def test_a_cost_tells_what_each_kind_loses_and_the_share_of_numbers_still_found() -> None:
    each, _ = measured()
    cost = each.cost(LOSSES)
    assert cost.loss == pytest.approx({"prose": 0.3, "copy": 0.9})
    assert cost.found == 3 / 4
    each._dense = DENSE_LOSS, (0, 0, 0, 0)
    assert each.cost(LOSSES).found is None


def test_a_set_is_measured_once_whatever_the_order_of_its_layers() -> None:
    each, trial = measured()
    found = each.of(tuple(keeps(3)), keeps(2, 1, 2))
    assert trial.tried == [{3: 0, 1: 0}, {3: 0, 2: 0}]
    assert each.of(tuple(keeps(1)), keeps(3)) == {keeps(3)[0]: found[keeps(1)[0]]}
    assert each.of_all(tuple(keeps(2, 3))) == found[keeps(2)[0]]
    assert len(trial.tried) == 2
    each.of(tuple(keeps(3)), keeps(0, 1, 2))
    assert trial.tried[2:] == [{3: 0, 0: 0}]
    each.of_all((LayerKeep(2, 0.5), LayerKeep(3, 0.0)))
    assert trial.tried[3:] == [{3: 0, 2: 0.5}]


def test_a_set_is_known_by_its_layers_with_their_keeps() -> None:
    assert key_of([LayerKeep(10, 1 / 3), LayerKeep(9, 0.0)]) == "9:0,10:0.3333"


def test_samples_are_loaded_when_the_first_thing_has_to_be_measured() -> None:
    trials: list[str] = []
    each, trial = measured(before_trial=lambda: trials.append("before"))
    assert trials == []
    each.of((), keeps(1, 2))
    assert len(trials) == 1 + len(trial.tried) == 3
    known, other_trial = measured(before_trial=lambda: pytest.fail("measured again"))
    assert each.dense[0] == DENSE_LOSS
    known.restore(each.as_dict())
    assert known.of((), keeps(1, 2)) == each.of((), keeps(1, 2))
    assert known.of_all(()) == Losses((0.0,) * 4, (1, 1, 1, 1))
    assert other_trial.tried == []


def test_what_was_measured_before_a_stop_is_known_after_it() -> None:
    left = 3

    def stop() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    each, _ = measured(before_trial=stop)
    with pytest.raises(KeyboardInterrupt):
        each.of((), keeps(0, 1, 2))
    assert list(each.known) == [key_of(keeps(0))]


def test_what_is_known_outlives_json_and_is_of_the_same_samples_alone() -> None:
    """Break seen: another tokenizer's samples, with what these cost."""
    each, _ = measured()
    each.of((), keeps(1))
    assert each.dense
    content = json.loads(json.dumps(each.as_dict()))
    same, _ = measured()
    same.restore(content)
    assert (same.known, same.dense) == (each.known, each.dense)
    fewer, _ = measured(samples=SAMPLES[1:])
    fewer.restore(content)
    assert fewer.known == {}


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_choice_that_breaks_the_model_is_worse_than_any_other(loss: float) -> None:
    each, _ = measured(layers_cost([loss]))
    [losses] = each.of((), keeps(0)).values()
    assert math.isfinite(each.mean(losses))
    assert each.mean(losses) > 1e6


def test_what_float_noise_makes_of_a_loss_does_not_show() -> None:
    noisy = layers_cost([0.1 + 3e-8, 0.2, 0.3, 0.4])
    assert measured(noisy)[0].of((), keeps(0)) == measured()[0].of((), keeps(0))
