"""A docstring's first line stands alone: help, an editor's hint and a list show no more of it."""

import ast
import re
from collections.abc import Iterator

from tests.conftest import ROOT

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# They say something only to whom the rest, or another docstring, is before the eyes.
HANGING = re.compile(r"(The same|See|Of)\b|(Args|Attributes|Raises|Returns):|$")


def first_lines() -> Iterator[tuple[str, str]]:
    """Where each docstring of the package stands, and how it begins."""
    for path in sorted((ROOT / "orthorank_vllm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, DOCUMENTED):
                continue
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                name = getattr(node, "name", "the module")
                yield f"{path.relative_to(ROOT)}: {name}", text.partition("\n")[0].strip()


def test_the_first_line_of_every_docstring_stands_alone() -> None:
    """Break seen: one that began with `Raises:`, and one with "Of"."""
    begun = list(first_lines())
    assert len(begun) > 300
    assert [(place, line) for place, line in begun if HANGING.match(line)] == []
