"""What stops the build of an image: docker/check_image.py, where something is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def checked(found_first: Path) -> subprocess.CompletedProcess[str]:
    """The check in this environment, but for distributions in a folder that go before its own."""
    return subprocess.run(
        [sys.executable, ROOT / "docker" / "check_image.py"],
        env={**os.environ, "PYTHONPATH": str(found_first)},
        capture_output=True,
        text=True,
        check=False,
    )


def distribution(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    path = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    path.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (path / "METADATA").write_text(metadata)
    (path / "entry_points.txt").write_text(entry_points)


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0+cu130"])
def test_another_vllm_is_refused(tmp_path: Path, version: str) -> None:
    distribution(tmp_path, "vllm", version)
    run = checked(tmp_path)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert f"error: vllm is {version}, supported is <" in run.stderr


def test_a_plugin_that_vllm_would_not_find_is_refused(tmp_path: Path) -> None:
    distribution(tmp_path, "orthorank-vllm", "0.1.0")
    run = checked(tmp_path)
    assert run.returncode == 1
    assert run.stderr == (
        "check_image: error: vLLM's entry points vllm.general_plugins do not name orthorank\n"
    )


def test_a_vllm_for_gpus_is_checked_on_a_machine_without_one(tmp_path: Path) -> None:
    """Break seen: asking `vllm serve --help`, which needs a device."""
    distribution(tmp_path, "vllm", "0.32.0")
    run = checked(tmp_path)
    assert run.returncode == 0, run.stderr
    assert "runs in vLLM 0.32.0\n" in run.stdout
