"""What needs an NVIDIA GPU: `pytest -m gpu tests/gpu`, and all of it by `make gpu-check`.

Each engine runs in a process of its own, so that one that dies, or that leaves the device in a bad
state, leaves the others alone.
"""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """Nothing of this starts without one."""
    if not torch.cuda.is_available() or torch.version.hip:
        pytest.skip(f"torch {torch.__version__} has no NVIDIA GPU here")
