"""The tools that these tests call, and the chart as Helm renders it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python as helm
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
CHART = ROOT / "deploy" / "orthorank-vllm"
ALERTS = CHART / "files" / "alerts.yaml"
DASHBOARD = CHART / "files" / "dashboard.json"
DOCKER = ROOT / "docker"

RELEASE, NAMESPACE = "demo", "prod"


def tool(*command: str | Path, **environment: str) -> str:
    """What a program prints; a failure of it is the test's."""
    name = str(command[0])
    # Those from PyPI lie beside this Python, the others are Debian's.
    path = Path(sys.executable).parent / name
    found = str(path) if path.exists() else shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is not installed: run this through make deploy-lint or deploy-test")
    run = subprocess.run(
        [found, *map(str, command[1:])],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
        check=False,
    )
    assert run.returncode == 0, f"{' '.join(map(str, command))}\n{run.stdout}{run.stderr}"
    return run.stdout + run.stderr


def values_file(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CHART / name).read_text())
    return loaded


def rendered(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The chart's objects by kind, as `helm install` would send them."""
    with helm.Chart.load(str(CHART)) as chart:
        texts = chart.render(dict(values), name=RELEASE, namespace=NAMESPACE)
    objects = [
        each
        for path, text in texts.items()
        if path.endswith(".yaml")
        for each in yaml.safe_load_all(text)
        if each
    ]
    return {each["kind"]: each for each in objects}
