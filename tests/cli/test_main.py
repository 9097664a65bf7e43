"""The command `orthorank` itself."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", ["calibrate", "evaluate", "bench"])
def test_without_vllm_a_command_says_in_one_line_how_to_install_it(command: str) -> None:
    """Break seen: a traceback, from a module of the command that imported vLLM."""
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        f"from orthorank_vllm.cli.main import main; sys.exit(main(['{command}', 'MODEL']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"orthorank {command}: error: vLLM cannot be imported (")
    assert result.stderr.endswith("pip install 'orthorank-vllm[vllm]'\n")
