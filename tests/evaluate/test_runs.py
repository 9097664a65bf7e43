"""Runs: what is to be measured, and the figures of what was."""

import pytest

from orthorank_vllm.evaluate.methods import METHODS
from orthorank_vllm.evaluate.runs import KindLoss, Run, plan_runs, repeats_the_rule
from orthorank_vllm.offline.served import AnswerLoss
from orthorank_vllm.options import LayerKeep

THIRDS = tuple(LayerKeep(layer, 1 / 3) for layer in (26, 7, 14))
NOTHING = tuple(LayerKeep(layer, 0.0) for layer in (29, 26))
PRUNED = tuple(LayerKeep(layer, 0.0) for layer in (28, 27))


def test_every_method_has_the_rules_layers_but_pruning_which_has_its_own() -> None:
    runs = plan_runs(
        ["orthorank", "prune", "random"], True, {0.06: THIRDS}, {"prune": {0.06: PRUNED}}, 30
    )
    assert [(run.method, run.layers, round(run.ratio, 4)) for run in runs] == [
        ("dense", (), 0),
        ("orthorank", THIRDS, 0.0667),
        ("prune", PRUNED, 0.0667),
        ("random", THIRDS, 0.0667),
    ]
    assert [run.label for run in runs][1:3] == ["orthorank 0.06", "prune 0.06"]


def test_a_rival_that_only_chooses_otherwise_is_left_out_where_nothing_is_chosen() -> None:
    methods = list(METHODS)
    pruned = {method: {0.06: PRUNED} for method in ("prune", "replace")}
    runs = plan_runs(methods, False, {0.06: NOTHING}, pruned, 30)
    assert [run.method for run in runs] == ["orthorank", "prune", "replace", "forget"]
    assert not any(repeats_the_rule(method, (*NOTHING, *THIRDS)) for method in methods)


def test_runs_are_like_each_other_by_method_and_layers_with_their_keeps() -> None:
    run = Run("orthorank", 0.1, 0.1, THIRDS)
    assert run.is_like(Run("orthorank", 0.2, 0.2, tuple(reversed(THIRDS))))
    assert not run.is_like(Run("random", 0.1, 0.1, THIRDS))
    assert not run.is_like(Run("orthorank", 0.1, 0.1, (*THIRDS[:2], LayerKeep(14, 0.5))))


def test_figures_are_means_over_tokens_and_of_first_tokens_over_answers() -> None:
    one = AnswerLoss(10, 1.0, 32.0, 30.0, first_kl=0.5, same=9, answers=1, spans=1, dense_found=1)
    other = AnswerLoss(30, 1.0, 60.0, 50.0, 0.1, 21, 1, spans=1, dense_found=1, found=1)
    loss = KindLoss.of("look-up", [one, other])
    assert (loss.answers, loss.tokens, loss.nats, loss.kl) == (2, 40, 2.3, 0.05)
    assert loss.added == pytest.approx(0.3)
    assert (loss.first_kl, loss.same, loss.dense_found, loss.found) == (0.3, 0.75, 1, 0.5)
    assert KindLoss.of("prose", [one, other]).found is None


def test_where_the_dense_model_finds_nothing_no_share_is_found() -> None:
    loss = KindLoss.of("look-up", [AnswerLoss(4, 1.0, 8.0, 8.0, answers=1, spans=1)])
    assert (loss.dense_found, loss.found) == (0, None)
