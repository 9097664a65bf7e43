"""Results: kept, and found again."""

import json
from pathlib import Path
from typing import Any

import pytest

from orthorank_vllm.evaluate.results import Results
from orthorank_vllm.evaluate.runs import KindLoss, Run
from orthorank_vllm.options import LayerKeep, OptionError

IDENTITY: dict[str, Any] = {"data": {"sha256": "0"}, "tasks": {}, "tail": 64}
LAYERS = (LayerKeep(9, 1 / 3), LayerKeep(4, 0.0))
LOSS = KindLoss(8, 1024, 3.1, 3.0, 0.05, 0.02, 0.9)


def load(folder: Path, **changed: object) -> Results:
    return Results.load(folder / "results.json", "m", {**IDENTITY, **changed})


def test_what_was_measured_of_a_run_is_found_again_by_method_and_layers(tmp_path: Path) -> None:
    run = Run("orthorank", 0.1, 0.1, LAYERS).with_loss(640, "prose", LOSS)
    load(tmp_path).add(run)
    again = load(tmp_path)
    assert again.of(Run("orthorank", 0.1, 0.1, LAYERS)) == run
    assert again.of(Run("orthorank", 0.12, 0.1, LAYERS)).label == "orthorank 0.12"
    assert again.of(Run("random", 0.1, 0.1, LAYERS)).served == {}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_run_grows_by_lengths_and_kinds(tmp_path: Path) -> None:
    results = load(tmp_path)
    run = Run("orthorank", 0.1, 0.1, LAYERS)
    for length, kind in ((640, "prose"), (640, "copy"), (2048, "prose")):
        results.add(results.of(run).with_loss(length, kind, LOSS))
    [known] = load(tmp_path).runs
    assert {length: list(kinds) for length, kinds in known.served.items()} == {
        640: ["prose", "copy"],
        2048: ["prose"],
    }


def test_results_of_something_else_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    load(tmp_path).write()
    before = path.read_text()
    with pytest.raises(OptionError, match="was measured with another tail; give another folder"):
        load(tmp_path, tail=1)
    path.write_text(before.replace('"format": 2', '"format": 1'))
    with pytest.raises(OptionError, match="is not one of this version"):
        load(tmp_path)
    path.write_text(json.dumps({"some": "file"}))
    with pytest.raises(OptionError, match="is not one of this version"):
        load(tmp_path)


def test_what_was_left_out_may_be_measured_later_and_is_then_known(tmp_path: Path) -> None:
    load(tmp_path).write()
    load(tmp_path, weights="a").write()
    load(tmp_path).check({"weights": "a"})
    with pytest.raises(OptionError, match="another weights"):
        load(tmp_path).check({"weights": "b"})
