"""The tool that times both paths in one process."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "time_steps.py"


@pytest.mark.model
def test_both_paths_and_the_plugins_part_of_decoding_are_timed(model_path: str) -> None:
    run = subprocess.run(
        [sys.executable, TOOL, model_path, "--lengths", "150", "--pairs", "2"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in run.stdout.splitlines()
    ]
    [(_, stock, sparse, _, _, plan, selection, _)] = [row for row in rows if row[0] == "150 tokens"]
    dense, forward, planned, selected = (
        float(cell.split()[0]) for cell in (stock, sparse, plan, selection)
    )
    assert 0 < planned + selected < forward < 10 * dense
    assert min(planned, selected) > 0
    decoding = [row for row in rows if row[0] in ("1", "8", "64")]
    assert len(decoding) == 3
    assert all(0 < float(share.rstrip("%")) < 20 for *_, share in decoding)
