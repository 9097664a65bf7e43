"""The benchmark that times both paths in one engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.random_models import SMALL

STEPS = ROOT / "benchmarks" / "steps.py"


def run(*arguments: str | Path) -> list[str]:
    """The lines that it prints."""
    done = subprocess.run(
        [sys.executable, STEPS, *arguments, "--pairs", "2"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.model
def test_both_paths_and_the_plugins_part_of_decoding_are_timed(small_model_path: str) -> None:
    lines = run(small_model_path, "--lengths", "150", "--layers", "1:1/3,3:0")
    results = json.loads(lines[-1])
    [prompts] = results["prompts"]
    assert prompts["work"] == "150 tokens"
    assert 0 < prompts["plan"] + prompts["selection"] < prompts["sparse"] < 10 * prompts["stock"]
    assert min(prompts["plan"], prompts["selection"]) > 0
    assert results["ratio"] == pytest.approx((2 / 3 + 1) / 6)
    low, median, high = prompts["times_as_fast"]
    assert 0 < low <= median <= high
    assert [row["batch"] for row in results["decoding"]] == [1, 8, 64]
    assert all(0 < row["plugin"] < 0.2 * row["step"] for row in results["decoding"])
    assert f"| {median:.3f} |" in next(line for line in lines if line.startswith("| 150 tokens"))


@pytest.mark.model
def test_a_configuration_alone_is_run_with_random_weights_by_several_ways(tmp_path: Path) -> None:
    config = {**SMALL, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= {"num_hidden_layers": 16, "hidden_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    chosen = "--load-format", "dummy", "--attention", "cpu,gather", "--lengths", "150"
    results = json.loads(run(tmp_path, *chosen, "--tokens", "450")[-1])
    assert [row["work"] for row in results["prompts"]] == [
        "3 x 150 tokens, cpu",
        "3 x 150 tokens, gather",
    ]
    assert 0.2 < results["ratio"] < 0.4


def test_the_shapes_that_have_a_name_are_whole_configurations() -> None:
    config = json.loads((STEPS.parent / "llama-3-8b.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (32, 4096)
    help_text = subprocess.run(
        [sys.executable, STEPS, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--shapes {llama-3-8b}" in help_text
