"""The names that are taken from vLLM: listed, and there; and the versions that have them."""

import ast
import itertools
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from orthorank_vllm import compat
from tests.conftest import ROOT

PACKAGE = ROOT / "orthorank_vllm"
AT_START_UP = compat.SEAMS + compat.WORKER_SEAMS
OF_CONNECTORS = tuple(itertools.chain.from_iterable(compat.CONNECTOR_SEAMS.values()))
CHECKED = AT_START_UP + compat.V2_SEAMS + compat.COMMAND_SEAMS + OF_CONNECTORS


def test_every_seam_is_in_this_vllm() -> None:
    compat.require_seams(CHECKED)


def taken_from_vllm(file: Path) -> Iterator[str]:
    """The names that a file imports from vLLM, and the attributes that it uses of them."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    imported: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "vllm":
                    yield alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                name = module if is_a_module(module) else f"{node.module}:{alias.name}"
                imported[alias.asname or alias.name] = name
                yield name
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = imported.get(node.value.id)
            if owner is not None:
                yield f"{owner}{'.' if ':' in owner else ':'}{node.attr}"


def is_a_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def test_every_name_that_is_taken_from_vllm_is_checked_at_start_up() -> None:
    """Or by `orthorank doctor`, if only the commands take it.

    Breaks seen: vLLM's own guard of the API key, which lies elsewhere since 0.29; a name that
    the sparse forward takes, in the list of the commands.
    """
    left_out = {
        (str(file.relative_to(PACKAGE)), name)
        for file in PACKAGE.rglob("*.py")
        for name in taken_from_vllm(file)
        # Itself or something of it.
        if not any(
            seam == name or seam.startswith((f"{name}.", f"{name}:")) for seam in lists_for(file)
        )
    }
    assert left_out == set()


def lists_for(file: Path) -> tuple[str, ...]:
    """The names that are checked before a file of the package runs."""
    if file == PACKAGE / "engine" / "runner_v2.py":
        return AT_START_UP + compat.V2_SEAMS
    if file.stem in compat.CONNECTOR_SEAMS:
        return AT_START_UP + compat.CONNECTOR_SEAMS[file.stem]
    if file.relative_to(PACKAGE).parts[0] in ("compat.py", "offline"):
        return AT_START_UP + compat.COMMAND_SEAMS
    return AT_START_UP


@pytest.mark.parametrize(
    "seam",
    ["vllm.engine.arg_utils:EngineArgs.add_flags", "vllm.no_such_module:anything"],
)
def test_a_missing_seam_is_named(seam: str) -> None:
    with pytest.raises(RuntimeError, match=rf"cannot work with vLLM .*: it lacks {seam}"):
        compat.require_seams((seam,))


def test_what_works_is_said_with_a_missing_seam() -> None:
    with pytest.raises(RuntimeError) as raised:
        compat.require_seams(("vllm.no_such_module:anything",))
    assert f"cannot work with vLLM {version('vllm')}: it lacks vllm.no_such" in str(raised.value)
    assert "Install vLLM 0.26 to 0.33, or uninstall" in str(raised.value)


def test_the_versions_that_work_are_those_of_pyproject(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the package has no metadata. Break seen: `<0.35` in one of the two."""
    extra = re.search(r'^vllm = \["(.*)"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert extra is not None
    wanted = Requirement(extra[1])
    assert Requirement(compat.REQUIREMENT) == wanted
    assert compat.supported_vllm() == wanted.specifier

    def without_metadata(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(compat, "requires", without_metadata)
    assert compat.supported_vllm() == wanted.specifier
