"""What `register` does to vLLM, and what stops the start-up."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import ModelRegistry

from orthorank_vllm import plugin
from orthorank_vllm.engine import models
from orthorank_vllm.model.architectures import MEASURED_OF, ORTHORANK_OF


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


def test_what_vllm_keeps_of_a_class_ends_with_any_change_of_ours() -> None:
    """Break seen: known by `plugin.py` alone, an upgrade's new abilities stayed refused."""
    plugin.register()
    registered = ModelRegistry.models["OrthoRankLlamaForCausalLM"]
    spec = importlib.util.find_spec(registered.module_name)
    assert spec is not None
    origin = Path(str(spec.origin))
    assert origin.name == "__init__.py"
    assert origin.parent in Path(models.__file__).parents


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
