"""Who may import whom: vLLM in a few places only, and our own files from the top down."""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.conftest import ROOT

PACKAGE = "orthorank_vllm"
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in (ROOT / PACKAGE).rglob("*.py")
}
# From the top down, by folders and by the files beside them: each imports from rows below its own.
# `cli/` is two: the program above all the commands, and below them what they share. The package
# itself is the first: it hands vLLM the classes of `plugin`, and has a version that all may read.
ROWS = (
    {""},
    {"cli.main"},
    {"bench", "doctor", "evaluate", "plugin"},
    {"calibrate"},
    {"engine"},
    {"metrics", "offline"},
    {"model"},
    {"attention", "cli", "resolve", "start_lines"},
    {"config", "flops", "profile_store"},
    {"profiles", "selection"},
    {"files"},
    {"compat", "options"},
)
TAKE_FROM_VLLM = {"attention", "compat", "engine", "model", "offline", "plugin"}
KNOW_NOTHING_OF_VLLM = {
    "config",
    "files",
    "flops",
    "metrics",
    "options",
    "profile_store",
    "profiles",
    "resolve",
    "selection",
    "start_lines",
}


def imports_of(module: str) -> Iterator[str]:
    """The modules that a module imports, at its top, in a function or for a type checker.

    One of the package's that is named in a string counts too: it is imported by that name.
    """
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{module}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # Of `from package import module` it is the module.
            yield from (names & FILES.keys()) or {node.module}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = re.fullmatch(rf"({PACKAGE}[a-z_.]*[a-z_])(\.[A-Z]\w*)?", node.value)
            if named is not None and named[1] in FILES:
                yield named[1]


IMPORTS = {module: set(imports_of(module)) for module in FILES}
OURS = {module: (found & FILES.keys()) - {PACKAGE} for module, found in IMPORTS.items()}


def part_of(module: str) -> str:
    """The part of the package that a module is in, see `ROWS`."""
    return "cli.main" if module == f"{PACKAGE}.cli.main" else f"{module}.".split(".")[1]


def imports_vllm(module: str) -> bool:
    return any(name.partition(".")[0] == "vllm" for name in IMPORTS[module])


def reached_from(modules: Iterable[str]) -> set[str]:
    """The modules themselves, and what they import, and so on."""
    reached: set[str] = set()
    left = list(modules)
    while left:
        module = left.pop()
        if module not in reached:
            reached.add(module)
            left.extend(OURS[module])
    return reached


def test_vllm_is_imported_only_where_it_may_be() -> None:
    """Breaks seen: in a function of `bench`, and for a type checker in `metrics`."""
    others = {module for module in FILES if part_of(module) not in TAKE_FROM_VLLM}
    assert {module for module in others if imports_vllm(module)} == set()


def test_what_knows_nothing_of_vllm_does_not_get_it_from_others_either() -> None:
    """Break seen: `profiles` asks `compat` for vLLM's cache."""
    below = reached_from(module for module in FILES if part_of(module) in KNOW_NOTHING_OF_VLLM)
    assert {module for module in below if imports_vllm(module)} == set()
    assert {part_of(module) for module in below} == KNOW_NOTHING_OF_VLLM


def test_the_selection_takes_numpy_torch_and_for_its_kernels_triton() -> None:
    """Breaks seen: triton in `topk`, scipy and our own `files` in `plan`."""
    for module in FILES:
        if part_of(module) == "selection":
            taken = {name.partition(".")[0] for name in IMPORTS[module]} - sys.stdlib_module_names
            triton = {"triton"} if module.endswith(".topk_triton") else set()
            assert taken <= {PACKAGE, "numpy", "torch"} | triton, module
            assert {part_of(name) for name in OURS[module]} <= {"selection", "options"}, module


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Break seen: `plan` imports `topk` in a function."""
    try:
        TopologicalSorter(OURS).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_folders_import_from_those_below_them() -> None:
    """And so in no circle.

    Breaks seen: `engine` imports `calibrate`, `doctor` imports `bench`, `cli/args.py` names a
    command's module, and a folder that stands in no row.
    """
    row_of = {part: number for number, row in enumerate(ROWS) for part in row}
    assert {part_of(module) for module in FILES} == row_of.keys()
    upwards = {
        f"{module} → {name}"
        for module, found in OURS.items()
        for name in found
        if part_of(module) != part_of(name) and row_of[part_of(module)] >= row_of[part_of(name)]
    }
    assert upwards == set()
