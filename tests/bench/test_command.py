"""`orthorank bench` against real servers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

pytestmark = pytest.mark.server

PAIRS = 7
MARK = "ORTHORANK_TEST_BENCH"  # inherited by whatever the command starts


@pytest.fixture(scope="module")
def found(small_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The terminal's table and the folder of one run, against the pruned model."""
    folder = tmp_path_factory.mktemp("bench")
    done = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "orthorank"), "bench", small_model_path),
            *("--ratios", "0.2", "--lengths", "256", "--concurrency", "2", "--output-len", "2"),
            *("--against", "prune", "--pairs", str(PAIRS), "-o", str(folder)),
            *("--orthorank-layers", "4:0,2:0.8", "--orthorank-tail", "8"),
            *("--enforce-eager", "--max-model-len", "512"),
        ],
        capture_output=True,
        text=True,
        # As a user: the engine in a process of its own.
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", MARK: str(folder)},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout, folder


def test_the_table_has_each_workload_with_its_ideal_and_a_verdict(found: tuple[str, Path]) -> None:
    lines = [line for line in found[0].splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines] == [
        "| against prune (1 layers left out)",
        "| 2 clients, 256 in, 2 out",
        "| between tokens, 2 clients",
    ]
    assert "requests/s" in lines[1]
    assert " ms " in lines[2]
    assert all(line.split(" | ")[-1].strip("* |") for line in lines[1:])


def test_the_json_holds_every_pair_and_what_ran(found: tuple[str, Path]) -> None:
    content = json.loads((found[1] / "results.json").read_text())
    (comparison,) = content["comparisons"]
    # 2 of 6 layers; position 0, the tail and the rounding up of each window take some.
    assert comparison["layers"] == {"4": 0, "2": 0.8}
    assert (comparison["window"], comparison["tail"]) == (128, 8)
    assert comparison["ratio_configured"] == pytest.approx(1.2 / 6)
    assert comparison["ratio"] == pytest.approx(1.2 / 6 * (1 - 9 / 256), rel=0.02)
    assert [len(rounds) for rounds in comparison["rounds"]] == [PAIRS, PAIRS]
    for rounds in comparison["rounds"]:
        orders = [list(seconds) for seconds in rounds]
        assert orders == ([["orthorank", "prune"], ["prune", "orthorank"]] * PAIRS)[:PAIRS]
        assert all(value > 0 for seconds in rounds for value in seconds.values())
    for memory in comparison["memory"].values():
        assert 300 < memory["private"] < memory["peak"]
    between = comparison["rows"][1]
    assert between["workload"] == "between tokens, 2 clients"
    # Five layers and the head against six: decode is dense on OrthoRank's side.
    assert 0.85 < between["ideal"] < 1
    assert content["flags"] == ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]


def test_the_plot_shows_every_row(found: tuple[str, Path]) -> None:
    picture = (found[1] / "plot.svg").read_text()
    assert picture.startswith("<svg")
    assert "2 clients, 256 in, 2 out" in picture
    assert "between tokens, 2 clients" in picture


def test_no_process_is_left_behind(found: tuple[str, Path]) -> None:
    marked = [p for p in psutil.process_iter() if _environment_of(p).get(MARK) == str(found[1])]
    assert not marked


def _environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return dict(process.environ())
    except psutil.Error:
        return {}
