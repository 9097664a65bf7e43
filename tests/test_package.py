"""What `pip install orthorank-vllm` installs, and what it must not."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from orthorank_vllm.doctor.installation import TESTED
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    # What an earlier build left there would get into the wheel, modules that are gone too.
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", folder, ROOT], check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tarfile.TarFile]:
    folder = tmp_path_factory.mktemp("sdist")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        yield archive


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
        "[console_scripts]\northorank = orthorank_vllm.cli.main:main",
        "[vllm.general_plugins]\northorank = orthorank_vllm.plugin:register",
    ]


def test_every_module_and_profile_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    package = ROOT / "orthorank_vllm"
    wanted = {
        str(Path("orthorank_vllm") / path.relative_to(package))
        for pattern in ("*.py", "*.json", "*.safetensors", "prose.txt", "py.typed")
        for path in package.rglob(pattern)
    }
    assert {name for name in wheel.namelist() if name.startswith("orthorank_vllm/")} == wanted


def test_the_metadata_says_where_the_project_is_and_what_it_runs_on(wheel: zipfile.ZipFile) -> None:
    metadata = Parser().parsestr(text_of(wheel, ".dist-info/METADATA"))
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL") or [])
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog", "Paper"} == set(urls)
    assert (ROOT / urls["Changelog"].rpartition("/")[2]).is_file()
    assert metadata["License-Expression"] == "Apache-2.0"
    classifiers = metadata.get_all("Classifier") or []
    pythons = [
        line for line in classifiers if line.startswith("Programming Language :: Python :: 3.")
    ]
    assert metadata["Requires-Python"] == ">=" + pythons[0].rpartition(" ")[2]
    assert "Typing :: Typed" in classifiers


def test_the_changelog_knows_this_version(wheel: zipfile.ZipFile) -> None:
    version = Parser().parsestr(text_of(wheel, ".dist-info/METADATA"))["Version"]
    headings = [
        line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line[:3] == "## "
    ]
    assert version in headings[0]


def test_the_source_distribution_is_the_whole_project(source_distribution: tarfile.TarFile) -> None:
    """Break seen: without MANIFEST.in it had the tests, but none of what they import.

    Without a history the project is such a distribution itself.
    """
    tracked = subprocess.run(
        ["git", "ls-files", "--cached"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("no history to compare with")
    packed = {name.partition("/")[2] for name in source_distribution.getnames()}
    assert [name for name in tracked.stdout.split() if name not in packed] == []


def test_the_compatibility_page_covers_the_versions_that_are_supported(
    wheel: zipfile.ZipFile,
) -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text()
    columns = re.search(r"^\| +\| (0\.\d+) \|.*\| (0\.\d+) \|$", text, re.MULTILINE)
    assert columns is not None
    oldest, newest = columns.groups()
    [vllm] = re.findall(r"^Requires-Dist: vllm(.*);", text_of(wheel, "METADATA"), re.MULTILINE)
    assert SpecifierSet(vllm).contains(oldest)
    assert SpecifierSet(vllm).contains(newest)
    # What the tests run with may be older: the newest has no wheel for CPUs on the index.
    assert TESTED["vllm"].rpartition(".")[0] in columns[0].split(" | ")
    beyond = [f"0.{int(oldest[2:]) - 1}.9", f"0.{int(newest[2:]) + 1}.0"]
    assert not any(SpecifierSet(vllm).contains(version) for version in beyond)
    for named in re.findall(r"`(tests/.*?)`", text):
        assert (ROOT / named).is_file(), named
