"""The tool that says how much of what stand-ins miss is in the tokens that are computed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orthorank_vllm.calibrate.text import held_back_text
from tests.conftest import ROOT
from tests.support.shipped import PROFILE


@pytest.mark.model
def test_the_errors_that_are_expected_name_nearly_the_tokens_that_are_missed_most(
    model_path: str, tmp_path: Path
) -> None:
    """On text that the maps were not fitted on, more of all error than the sink names."""
    data = tmp_path / "text.txt"
    data.write_text(held_back_text().content)
    tool, maps = ROOT / "tools" / "stand_in_errors.py", str(PROFILE.stand_in_path)
    done = subprocess.run(
        [sys.executable, tool, model_path, maps, "--data", data, "--samples", "2"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(map(int, found)) == sorted(entry.layer for entry in PROFILE.entries)
    for layer, (themselves, expected, sink) in ((k, v.values()) for k, v in found.items()):
        assert all(most >= some for most, some in zip(themselves, expected, strict=True)), layer
        assert expected[0] > 1.2 * 1 / 6, layer
        assert expected[0] > 0.75 * themselves[0], layer
        assert expected[0] > sink[0], layer
