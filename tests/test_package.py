"""What `pip install orthorank-vllm` installs, and what it must not."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    # What an earlier build left there would get into the wheel, modules that are gone too.
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", folder, ROOT], check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def text_of(wheel: zipfile.ZipFile, ending: str) -> str:
    return wheel.read(next(n for n in wheel.namelist() if n.endswith(ending))).decode()


def test_vllm_is_an_extra_so_an_install_never_replaces_it(wheel: zipfile.ZipFile) -> None:
    metadata = Parser().parsestr(text_of(wheel, ".dist-info/METADATA"))
    requirements = metadata.get_all("Requires-Dist") or []
    always = [line for line in requirements if "extra ==" not in line]
    held_by_every_vllm = {"numpy", "torch", "prometheus-client", "filelock", "jsonschema", "tqdm"}
    assert {line.split(">")[0] for line in always} == held_by_every_vllm
    assert not any("<" in line or "==" in line for line in always)
    assert any(line.startswith("vllm") for line in requirements)


def test_vllm_finds_the_plugin_and_the_shell_its_command(wheel: zipfile.ZipFile) -> None:
    sections = text_of(wheel, "entry_points.txt").strip().split("\n\n")
    assert sorted(sections) == [
        "[console_scripts]\northorank = orthorank_vllm.cli:main",
        "[vllm.general_plugins]\northorank = orthorank_vllm.plugin:register",
    ]


def test_every_module_and_profile_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    package = ROOT / "orthorank_vllm"
    wanted = {
        str(Path("orthorank_vllm") / path.relative_to(package))
        for pattern in ("*.py", "*.json", "py.typed")
        for path in package.rglob(pattern)
    }
    assert {name for name in wheel.namelist() if name.startswith("orthorank_vllm/")} == wanted
