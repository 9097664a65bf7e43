"""The names that are taken from vLLM, looked for in its sources without importing them."""

import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools import check_vllm
from tools.check_vllm import CHECKED, main
from tools.vllm_source import Source, unpacked

MODULE = """
from .other import Base as Renamed, helper
from .more import *
if True:
    FLAG = 1
TABLE = {"on_demand": lambda: 1}
ours = Renamed()
class Child(Renamed):
    async def answer(self, question): ...
def function(one: int, two: str = "2", *rest: int, key: bool = True) -> None:
    within = 1
    from .other import hidden
"""
OTHER = """
class Base:
    VALUE = 3
    size: int
    def __init__(self):
        local = 1
    def inherited(self): ...
def helper(): ...
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a small package `vllm` stands."""
    for name, text in {
        "__init__.py": "",
        "module.py": MODULE,
        "other.py": OTHER,
        "more.py": "STARRED = 1\n",
    }.items():
        file = tmp_path / "unpacked" / "vllm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "unpacked"


@pytest.mark.parametrize(
    "name",
    [
        *("Child", "Child.answer", "Child.inherited", "Child.VALUE", "Child.size"),
        *("Child.__init__", "Renamed", "ours.inherited", "helper", "FLAG", "on_demand"),
        *("STARRED", "function"),
    ],
)
def test_a_name_is_found_however_a_module_comes_by_it(folder: Path, name: str) -> None:
    assert Source(folder).has(f"vllm.module:{name}")


@pytest.mark.parametrize(
    "seam",
    [
        *("vllm.module:absent", "vllm.module:Child.absent", "vllm.absent:Child"),
        # What a function keeps to itself is no module's.
        *("vllm.module:within", "vllm.module:hidden", "vllm.module:Child.local"),
    ],
)
def test_a_name_that_is_not_there_is_not_found(folder: Path, seam: str) -> None:
    """Break seen: every name in a module, those within its functions too."""
    assert not Source(folder).has(seam)


def test_what_a_function_takes_is_told_by_names_alone(folder: Path) -> None:
    source = Source(folder)
    assert source.parameters("vllm.module:function") == "one, two='2', *rest, key=True"
    assert source.parameters("vllm.module:Child.answer") == "self, question"
    assert source.parameters("vllm.module:FLAG") is None
    assert source.parameters("vllm.module:Child") is None


@pytest.fixture(scope="module")
def installed() -> Source:
    """vLLM as the tests run with it."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Source(Path(spec.origin).parent.parent)


def test_in_the_installed_vllm_all_names_are_found(installed: Source) -> None:
    """As they are by importing it (`tests/test_compat.py`)."""
    assert [seam for seam in CHECKED if not installed.has(seam)] == []


@pytest.mark.parametrize("seam", CHECKED)
def test_in_the_installed_vllm_a_name_beside_each_is_not_found(
    installed: Source, seam: str
) -> None:
    """Breaks seen: `__init__` of a class that is not there; the platform, of any module."""
    assert not installed.has(f"{seam}_of_no_version")
    module, _, path = seam.partition(":")
    assert not installed.has(f"{module}_of_no_version:{path}")


def archived(folder: Path, kind: str) -> Path:
    """The package as it is published, and something of it that is no Python file."""
    (folder / "vllm" / "kernels.so").write_bytes(b"0")
    files = [path for path in folder.rglob("*") if path.is_file()]
    archive = folder.parent / f"vllm-1.0.{kind}"
    if kind == "whl":
        with zipfile.ZipFile(archive, "w") as wheel:
            for file in files:
                wheel.write(file, file.relative_to(folder))
    else:
        with tarfile.open(archive, "w:gz") as source:
            for file in files:
                source.add(file, Path("vllm-1.0", file.relative_to(folder)))
    return archive


@pytest.mark.parametrize("kind", ["whl", "tar.gz"])
def test_of_an_archive_the_python_files_are_unpacked(folder: Path, kind: str) -> None:
    into = folder.parent / "into"
    into.mkdir()
    found = unpacked(str(archived(folder, kind)), into)
    assert Source(found).has("vllm.module:Child.answer")
    assert not list(into.rglob("*.so"))


@pytest.mark.parametrize("within", ["", "vllm"])
def test_a_folder_may_be_the_packages_own_or_the_one_around_it(folder: Path, within: str) -> None:
    assert unpacked(str(folder / within), folder.parent) == folder


def test_a_version_is_fetched_and_not_installed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a pip that knows of vLLM and of no distribution for CPUs."""
    wheel = archived(folder, "whl")
    pip = tmp_path / "stand-in" / "pip.py"
    pip.parent.mkdir()
    pip.write_text(
        "import shutil, sys\n"
        "*options, asked = sys.argv[1:]\n"
        "assert options[0] == 'download' and '--no-deps' in options, options\n"
        "if asked != 'vllm==1.0': sys.exit(1)\n"
        f"shutil.copy({str(wheel)!r}, options[options.index('--dest') + 1])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(pip.parent))
    into = tmp_path / "into"
    into.mkdir()
    assert Source(unpacked("1.0", into)).has("vllm.module:Child")
    with pytest.raises(ValueError, match=r"2\.0: pip finds no wheel of it"):
        unpacked("2.0", tmp_path / "elsewhere")


@pytest.fixture
def another(folder: Path) -> Path:
    """A version without a name, and with one more argument."""
    module = folder.parent / "another" / "vllm" / "module.py"
    module.parent.mkdir(parents=True)
    (module.parent / "__init__.py").touch()
    module.write_text("def function(one, two, three): ...\n")
    return module.parent.parent


def test_what_is_lacking_and_what_takes_something_else_is_told(
    folder: Path,
    another: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(check_vllm, "CHECKED", ("vllm.module:FLAG", "vllm.module:function"))
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"2 names, 0 of them not everywhere in {folder}\n"
    assert main([str(folder), str(another)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"vllm.module:FLAG: not in {another}",
        "vllm.module:function takes",
        f"    in {folder}: one, two='2', *rest, key=True",
        f"    in {another}: one, two, three",
        f"2 names, 1 of them not everywhere in {folder}, {another}",
    ]


@pytest.mark.parametrize("asked", ["no-such-folder", str(Path(sys.prefix) / "bin")])
def test_what_is_no_vllm_is_answered_in_one_line(
    asked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([asked])
    last = capsys.readouterr().err.splitlines()[-1]
    assert asked in last
    assert "no vLLM in it" in last or "neither a file or folder nor a version" in last
