"""Results: what is to be measured, and what was."""

import json
from pathlib import Path
from typing import Any

import pytest

from orthorank_vllm.evaluate.results import Results, Run, plan_runs
from orthorank_vllm.options import OptionError
from orthorank_vllm.profiles import Profile
from orthorank_vllm.selection.method import Method

MODEL = {"num_hidden_layers": 30}
PROFILES = {
    "orthorank": Profile("p", MODEL, (7, 26, 14, 25, 13, 3, 5, 17, 12), 1 / 3, 128),
    "prune": Profile("p", MODEL, (9, 20, 4, 5, 6, 22), 1 / 3, 128, method="prune"),
}
IDENTITY: dict[str, Any] = {"data": {"sha256": "0"}, "tasks": {}, "keep": 1 / 3}


def test_pruning_drops_ratio_times_layers_and_the_others_more_layers_in_part() -> None:
    runs = plan_runs(["orthorank", "prune", "random"], [0, 0.1, 0.2], PROFILES, Method())
    assert [(run.method, len(run.layers), round(run.ratio, 3)) for run in runs] == [
        ("dense", 0, 0),
        ("orthorank", 5, 0.111),
        ("prune", 3, 0.1),
        ("random", 5, 0.111),
        ("orthorank", 9, 0.2),
        ("prune", 6, 0.2),
        ("random", 9, 0.2),
    ]
    assert runs[1].layers == runs[3].layers == (7, 13, 14, 25, 26)


def test_a_ratio_past_the_profile_is_refused() -> None:
    with pytest.raises(OptionError, match=r"--ratios 0\.3: it needs 14 layers and the profile p"):
        plan_runs(["orthorank"], [0.3], PROFILES, Method())


def test_a_measured_run_is_found_again_by_method_and_layers(tmp_path: Path) -> None:
    results = Results.load(tmp_path / "results.json", "m", IDENTITY)
    run = Run("prune", 0.1, 0.1, (4, 9, 20), perplexity=12.5, tasks={})
    results.add(run)
    again = Results.load(tmp_path / "results.json", "m", IDENTITY)
    assert again.measured(Run("prune", 0.1, 0.1, (4, 9, 20))) == run
    assert again.measured(Run("prune", 0.1, 0.1, (4, 9, 21))) is None
    assert again.measured(Run("random", 0.1, 0.1, (4, 9, 20))) is None
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_results_of_something_else_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Results.load(path, "m", IDENTITY).write()
    before = path.read_text()
    with pytest.raises(OptionError, match="was measured with another keep; give another folder"):
        Results.load(path, "m", {**IDENTITY, "keep": 0.5})
    path.write_text(json.dumps({"some": "file"}))
    with pytest.raises(OptionError, match="is not one of this version"):
        Results.load(path, "m", IDENTITY)
    assert before != path.read_text()


def test_the_table_has_a_line_for_each_run(tmp_path: Path) -> None:
    identity = {**IDENTITY, "tasks": {"arc": "0"}}
    results = Results(tmp_path / "results.json", "m", identity)
    found = {"arc": {"acc": 0.5, "stderr": 0.05, "questions": 100}}
    runs = [Run("dense", 0, 0, (), 20.0, found), Run("prune", 0.1, 0.1, (4,), 33.333, found)]
    assert results.table(runs).splitlines() == [
        "method  ratio  perplexity               arc",
        "dense   0.000       20.00     0.500 ± 0.050",
        "prune   0.100       33.33     0.500 ± 0.050",
    ]
