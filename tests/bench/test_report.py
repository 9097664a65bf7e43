"""What is reckoned of what was measured, and how it is told."""

import json
from dataclasses import replace
from typing import Any

import pytest

from orthorank_vllm.bench.report import OURS, Comparison, Results, load_gain, table
from orthorank_vllm.bench.servers import Memory
from orthorank_vllm.bench.workloads import plan_workloads
from orthorank_vllm.flops import Shapes, prefill_flops

SHAPES = Shapes(4, 64, 4, 4, 16, 128, vocabulary=100)
PAIRS = 7


def results_of(rival: str, **changed: Any) -> Results:
    """Of one ratio: every time of OrthoRank's is 1 s, and its rival's 1.2 s."""
    workloads = plan_workloads([512], [1], output_len=1)
    forth = {OURS: 1.0, rival: 1.2}
    back = dict(reversed(forth.items()))
    comparison = Comparison(
        ratio_asked=0.3,
        ratio_configured=0.3125,
        ratio=0.275,
        layers={3: 0.0, 1: 0.75},
        window=128,
        tail=64,
        removed=1,
        workloads=workloads,
        rounds=[([forth, back] * PAIRS)[:PAIRS] for _ in workloads],
        memory=dict.fromkeys((OURS, rival), Memory(300, 400)),
    )
    machine = {"vllm": "0.32.0", "gpus": [], "cpu": "a", "cores": 2}
    return Results("m", [], SHAPES, machine, [replace(comparison, **changed)])


def test_under_load_only_the_share_of_prefill_gains() -> None:
    assert load_gain(1, 1.4) == pytest.approx(1.4)
    assert load_gain(0, 1.4) == 1
    assert load_gain(0.5, 2) == pytest.approx(4 / 3)


def test_the_ideal_is_of_the_layers_that_the_server_runs_each_with_its_keep() -> None:
    """Break seen: a tail that the arithmetic did not know."""
    results = results_of("stock")
    [comparison] = results.comparisons
    first, between = results.rows(comparison)
    sparse = prefill_flops(SHAPES, 512, {3: 0.0, 1: 0.75}, window=128, tail=64)
    assert first.ideal == prefill_flops(SHAPES, 512) / sparse
    assert between.ideal == 1
    assert 1.2 < first.ideal < 1 / (1 - 0.3125)


def test_a_pruned_rivals_ideal_is_of_fewer_layers() -> None:
    results = results_of("prune", removed=2)
    first, between = results.rows(results.comparisons[0])
    assert first.ideal is not None
    assert first.ideal < 1
    assert between.ideal is not None
    assert 0.5 < between.ideal < 1


@pytest.mark.parametrize("asked", [0.3, "auto"])
def test_the_table_and_the_json_say_what_was_run(asked: object) -> None:
    results = results_of("stock", ratio_asked=asked)
    assert (
        f"Ratio 0.275 reached (asked for {asked}, configured 0.312), 2 of 4 layers selective, "
        "tail 64, 7 pairs:"
    ) in table(results)
    [comparison] = json.loads(results.as_json())["comparisons"]
    assert (comparison["ratio_asked"], comparison["ratio_configured"]) == (asked, 0.3125)
    assert comparison["layers"] == {"3": 0.0, "1": 0.75}
    assert (comparison["window"], comparison["tail"]) == (128, 64)
