"""The report's page, from figures that were not measured."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from orthorank_vllm.evaluate.plots import kl_against_ratio
from orthorank_vllm.evaluate.report import render
from orthorank_vllm.evaluate.results import Results
from orthorank_vllm.evaluate.runs import KindLoss, Run
from orthorank_vllm.options import LayerKeep
from orthorank_vllm.profiles import Cost, Entry, Profile

IDENTITY: dict[str, Any] = {
    "dtype": "float32",
    "window": 128,
    "tail": 64,
    "data": {"name": "test.txt", "sha256": "0" * 64},
    "segments": {"length": 2048, "count": 3},
    "tasks": {"arc": "0"},
}
ENTRIES = (
    Entry(9, 0.0, Cost({"prose": 0.01, "copy": 0.0}), Cost({"prose": 0.02, "copy": 0.01})),
    Entry(8, 0.5, Cost({"prose": 0.03, "copy": 0.02}), Cost({"prose": 0.05, "copy": 0.02})),
    Entry(7, 0.5),
)
TEXTS = {"name": "docs", "sha256": "1" * 64, "samples": {}}
PROFILE = Profile("mine", {"num_hidden_layers": 10}, ENTRIES, 128, 64, data={"held_back": TEXTS})
TASKS = {"arc": {"acc": 0.5, "stderr": 0.05, "questions": 100, "acc_norm": 0.625}}


def loss(kl: float, found: float | None = None) -> KindLoss:
    return KindLoss(8, 1024, 3.0 + kl, 3.0, kl, kl, 0.9, found and 0.75, found)


def run(method: str, ratio: float, kl: float) -> Run:
    served = {640: {"prose": loss(kl), "look-up": loss(kl, 0.8)}, 2048: {"prose": loss(kl)}}
    layers = (LayerKeep(9, 0.0), LayerKeep(8, 0.5))[: round(ratio * 10)]
    return Run(method, ratio, ratio, layers, served, 20.0 + kl, TASKS)


RUNS = [
    run("dense", 0, 0.0),
    *(run("orthorank", 0.1, 0.0), run("orthorank", 0.2, 0.04)),
    *(run("prune", 0.1, 0.4), run("prune", 0.2, 4.0)),
]


@pytest.fixture(scope="module")
def page() -> str:
    results = Results(Path("r"), "A<B", IDENTITY, {"orthorank": PROFILE}, [], [[1.0, 0.5]] * 10)
    results.versions = {"vllm": "0.32"}
    return render(results, RUNS, [640, 2048])


def test_answers_come_first_then_the_whole_text_then_tasks(page: str) -> None:
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Answers to prompts of 640 tokens",
        "Answers to prompts of 2048 tokens",
        "The whole text, and tasks",
        "Zero-shot accuracy",
        "Calibration: what the profile expects",
        "Alignment with the sink",
        "How it was measured",
    ]
    figures = ["kl-640", "kl-2048", "perplexity", "task-arc", "entries", "cosines"]
    assert re.findall('<figure id="(.*?)"', page) == figures


def test_the_lead_says_what_the_largest_ratio_costs(page: str) -> None:
    assert (
        "At ratio 0.200, answers to prompts of 640 tokens are off the dense model&#x27;s by "
        "prose 0.040, look-up 0.040 nats a token; 80% of numbers found." in page
    )
    assert "A&lt;B" in page


def test_a_table_has_a_row_for_each_kind_and_run(page: str) -> None:
    table = page[page.index("<table>") : page.index("</table>")]
    first = re.findall(r'<tr[^>]*><t[hd](?: colspan="8")?>(.*?)</t', table)
    labels = ["dense", "orthorank 0.1", "orthorank 0.2", "prune 0.1", "prune 0.2"]
    assert first == [
        "",
        *("prose: 8 answers, 1024 tokens", *labels),
        *("look-up: 8 answers, 1024 tokens", *labels),
    ]


def test_what_was_not_measured_is_not_on_the_page() -> None:
    bare = {**IDENTITY, "tasks": {}}
    del bare["segments"]
    profile = Profile("mine", {"num_hidden_layers": 10}, ENTRIES[2:], 128, 64)
    results = Results(Path("r"), "m", bare, {"orthorank": profile}, [], [[1.0, 0.5]] * 10)
    dense = Run("dense", 0, 0, (), {640: {"prose": loss(0.0)}})
    page = render(results, [dense], [640])
    assert "Only the dense model was measured." in page
    assert re.findall('<figure id="(.*?)"', page) == ["cosines"]


def test_a_loss_of_nothing_has_a_place_on_a_logarithmic_scale() -> None:
    svg = kl_against_ratio(RUNS, 640)
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert all(label in svg for label in ("prose", "look-up", "orthorank", "prune"))
    assert "nan" not in svg
