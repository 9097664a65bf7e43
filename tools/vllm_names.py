"""The names that the package takes from vLLM, found in the source of other versions of it.

    python tools/vllm_names.py 0.26=FOLDER 0.27=FOLDER …

Each folder holds an unpacked wheel, of which nothing is imported. Prints a table of the names that
are not in all of them, and ends with 1 if there is one.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from orthorank_vllm import compat

CHECKED = (*compat.SEAMS, *compat.WORKER_SEAMS, *compat.GPU_SEAMS, *compat.COMMAND_SEAMS)
# Attributes that a class has without defining them.
INHERITED = ("__init__",)


class Source:
    """vLLM's modules as they are written in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._trees: dict[str, ast.Module | None] = {}

    def has(self, seam: str) -> bool:
        """Whether a `module:attributes` is defined there, as far as the text alone tells."""
        module, _, path = seam.partition(":")
        name, _, attribute = path.partition(".")
        return self._has_name(module, name) and (
            not attribute or self._has_attribute(module, name, attribute)
        )

    def _tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            path = self._folder.joinpath(*module.split("."))
            files = [path.with_suffix(".py"), path / "__init__.py"]
            file = next((file for file in files if file.exists()), None)
            self._trees[module] = None if file is None else ast.parse(file.read_text())
        return self._trees[module]

    def _definitions(self, module: str, name: str) -> Iterator[ast.AST]:
        tree = self._tree(module)
        for node in ast.walk(tree) if tree else ():
            match node:
                case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                    if node.name == name:
                        yield node
                case ast.ImportFrom(names=[ast.alias(name="*")], module=path, level=level):
                    yield from self._definitions(self._absolute(module, path, level), name)
                case ast.ImportFrom() | ast.Import():
                    if any((alias.asname or alias.name) == name for alias in node.names):
                        yield node
                case ast.Assign():
                    if any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                        yield node
                case ast.AnnAssign():
                    if isinstance(node.target, ast.Name) and node.target.id == name:
                        yield node
                # A table of what the module's `__getattr__` makes on demand.
                case ast.Dict():
                    if any(isinstance(k, ast.Constant) and k.value == name for k in node.keys):
                        yield node

    def _has_name(self, module: str, name: str) -> bool:
        return any(True for _ in self._definitions(module, name))

    def _has_attribute(self, module: str, name: str, attribute: str) -> bool:
        if attribute in INHERITED:
            return True
        return any(
            attribute in _members(owner) or self._has_in_base(found, owner, attribute)
            for found, owner in self._classes(module, name)
        )

    def _has_in_base(self, module: str, owner: ast.ClassDef, attribute: str) -> bool:
        return any(
            self._has_attribute(module, base.id, attribute)
            for base in owner.bases
            if isinstance(base, ast.Name)
        )

    def _classes(self, module: str, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
        """The class of that name or the one that it is an instance of, wherever it is defined."""
        for node in self._definitions(module, name):
            match node:
                case ast.ClassDef():
                    yield module, node
                case ast.ImportFrom(module=path, level=level) if level or path:
                    original = next(a.name for a in node.names if (a.asname or a.name) == name)
                    yield from self._classes(self._absolute(module, path, level), original)
                case ast.Assign(value=ast.Call(func=ast.Name(id=maker))):
                    yield from self._classes(module, maker)
                case ast.AnnAssign(annotation=ast.Name(id=maker)) if maker != name:
                    yield from self._classes(module, maker)
        # Platforms: which class is known when it runs. All inherit from this one.
        if name == "current_platform":
            yield from self._classes("vllm.platforms.interface", "Platform")

    def _absolute(self, module: str, path: str | None, level: int) -> str:
        if not level:
            return path or ""
        is_package = self._folder.joinpath(*module.split(".")).is_dir()
        parents = module.split(".")[: None if is_package and level == 1 else is_package - level]
        return ".".join([*parents, *([path] if path else [])])


def _members(owner: ast.ClassDef) -> set[str]:
    names = {node.name for node in owner.body if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(owner):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="+", metavar="VERSION=FOLDER")
    versions = dict(text.split("=", 1) for text in parser.parse_args(argv).versions)
    sources = {version: Source(Path(folder)) for version, folder in versions.items()}
    is_in_all = True
    for seam in CHECKED:
        lacking = [version for version, source in sources.items() if not source.has(seam)]
        if lacking:
            print(f"{seam}: not in {', '.join(lacking)}")
            is_in_all = False
    print(f"{len(CHECKED)} names, {len(sources)} versions")
    return 0 if is_in_all else 1


if __name__ == "__main__":
    sys.exit(main())
