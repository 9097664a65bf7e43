"""What `register` does to vLLM, and what it refuses to do without."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import ModelRegistry

from orthorank_vllm import plugin
from orthorank_vllm.model.architectures import MEASURED_OF, ORTHORANK_OF
from tests.conftest import ROOT

CHECKED = (*plugin.SEAMS, *plugin.WORKER_SEAMS, *plugin.GPU_SEAMS, *plugin.COMMAND_SEAMS)


def test_registering_twice_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    before = EngineArgs.add_cli_args, EngineArgs.create_engine_config
    plugin.register()
    assert (EngineArgs.add_cli_args, EngineArgs.create_engine_config) == before


def test_the_architectures_are_known_to_vllm() -> None:
    plugin.register()
    known = ModelRegistry.get_supported_archs()
    assert set(ORTHORANK_OF) < set(known)
    assert {*ORTHORANK_OF.values(), *MEASURED_OF.values()} < set(known)


def test_every_seam_is_in_this_vllm() -> None:
    plugin.require_seams(CHECKED)


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


def test_every_name_that_is_taken_from_vllm_is_checked() -> None:
    """Break seen: vLLM's own guard of the API key, which lies elsewhere since 0.29."""
    left_out = {
        (str(file.relative_to(ROOT)), name)
        for file in (ROOT / "orthorank_vllm").rglob("*.py")
        for name in taken_from_vllm(file)
        # Itself or something of it.
        if not any(seam == name or seam.startswith((f"{name}.", f"{name}:")) for seam in CHECKED)
    }
    assert left_out == set()


@pytest.mark.parametrize(
    "seam",
    ["vllm.engine.arg_utils:EngineArgs.add_flags", "vllm.no_such_module:anything"],
)
def test_a_missing_seam_is_named(seam: str) -> None:
    with pytest.raises(RuntimeError, match=rf"cannot work with vLLM .*: it lacks {seam}"):
        plugin.require_seams((seam,))


def test_a_runner_that_would_run_without_plans_stops_the_start_up() -> None:
    """Break seen: a subclass that overrides `_model_forward` and serves densely, in silence."""
    code = """
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

class OtherRunner(GPUModelRunner):
    def _model_forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

import orthorank_vllm.plugin
try:
    orthorank_vllm.plugin.OrthoRankLlamaForCausalLM
except RuntimeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "OrthoRank would be inactive: OtherRunner overrides _model_forward" in result.stdout


def test_a_process_that_runs_no_model_leaves_the_runner_alone() -> None:
    code = """
import sys
from orthorank_vllm.plugin import register
register()
print("vllm.v1.worker.gpu_model_runner" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split()[-1] == "False"
