"""What the live tests share: the image, built as a user builds it, and a small real model."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.live.containers import ENVIRONMENT
from tests.deploy.tools import ROOT, tool

VENV = Path(os.environ.get("ORTHORANK_TEST_VENV", ROOT / ".venv"))
MODEL = Path(os.environ.get("ORTHORANK_TEST_MODEL", ROOT / ".models" / "SmolLM2-135M-Instruct"))
BASE = "localhost/vllm-cpu:test"
IMAGE = "localhost/orthorank-vllm:test"
REVISION = "0123abc"
# The real model's first six layers: quick to start, and a model for which no profile ships.
FIRST_LAYERS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
source, folder = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=6).save_pretrained(folder)
AutoTokenizer.from_pretrained(source).save_pretrained(folder)
"""


@pytest.fixture(scope="session")
def image() -> str:
    tool(ROOT / "tests" / "deploy" / "base" / "build.sh", VENV)
    options = ["--isolation", "chroot", "--pull-never", "--format", "docker", "--layers"]
    given = ["--build-arg", f"BASE={BASE}", "--build-arg", f"REVISION={REVISION}"]
    built = [*given, "-f", "docker/Dockerfile", "-t", IMAGE, "."]
    printed = tool("buildah", "bud", *options, *built, **ENVIRONMENT)
    assert "check_image: orthorank-vllm" in printed or "Using cache" in printed
    return IMAGE


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    # Readable for any user: the container's is not the one who runs the tests.
    folder = tmp_path_factory.mktemp("models") / "six"
    tool(VENV / "bin" / "python", "-c", FIRST_LAYERS, MODEL, folder, HF_HUB_OFFLINE="1")
    for each in (folder, *folder.iterdir()):
        each.chmod(0o755)
    for parent in list(folder.parents)[:3]:
        parent.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
