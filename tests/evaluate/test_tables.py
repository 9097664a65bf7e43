"""The tables on the terminal."""

from pathlib import Path
from typing import Any

from orthorank_vllm.evaluate.results import Results
from orthorank_vllm.evaluate.runs import KindLoss, Run
from orthorank_vllm.evaluate.tables import SERVED_NOTES, tables
from orthorank_vllm.options import LayerKeep

DENSE = KindLoss(8, 1024, 3.0, 3.0, 0.0, 0.0, 1.0)
LOST = KindLoss(8, 1024, 3.125, 3.0, 0.0512, 0.0204, 0.9)
LOOK_UP = KindLoss(24, 96, 0.5, 0.25, 0.2, 0.4, 0.8, dense_found=0.75, found=0.5)
LAYERS = (LayerKeep(29, 0.0),)


def runs(**more: Any) -> list[Run]:
    kinds = {"look-up": LOOK_UP}
    return [
        Run("dense", 0, 0, (), {640: {"prose": DENSE, **kinds}}, **more),
        Run("orthorank", 0.1, 0.1, LAYERS, {640: {"prose": LOST, **kinds}}, **more),
    ]


def test_what_answers_lose_comes_first_by_length_and_kind(tmp_path: Path) -> None:
    results = Results(tmp_path, "m", {"tasks": {"arc": "0"}})
    found = {"arc": {"acc": 0.5, "stderr": 0.05, "questions": 100}}
    assert tables(results, runs(perplexity=20.0, tasks=found), [640, 2048]).splitlines() == [
        "answers to prompts of 640 tokens",
        "kind     method     ratio   nats   added      KL  first KL   same  found",
        "prose    dense      0.000  3.000",
        "prose    orthorank  0.100  3.125  +0.125  0.0512    0.0204  0.900",
        "look-up  dense      0.000  0.500                                    0.75",
        "look-up  orthorank  0.100  0.500  +0.250  0.2000    0.4000  0.800   0.50",
        "",
        *SERVED_NOTES,
        "",
        "the whole text, and tasks",
        "method     ratio  perplexity            arc",
        "dense      0.000       20.00  0.500 ± 0.050",
        "orthorank  0.100       20.00  0.500 ± 0.050",
    ]


def test_what_was_not_measured_has_no_table(tmp_path: Path) -> None:
    results = Results(tmp_path, "m", {"tasks": {}})
    assert tables(results, runs(), [640]).splitlines()[-1] == SERVED_NOTES[-1]
    assert tables(results, [Run("dense", 0, 0, (), perplexity=20.0)], [640]).splitlines() == [
        "the whole text, and tasks",
        "method  ratio  perplexity",
        "dense   0.000       20.00",
    ]
