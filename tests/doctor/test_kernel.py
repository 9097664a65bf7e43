"""The doctor's look at the attention kernel, which it takes on a GPU only."""

import math

import pytest
import torch

from orthorank_vllm.doctor import kernel
from tests.support.scripts import Script

DIFFERENCE = """
import torch
from orthorank_vllm.doctor.kernel import largest_difference
answer(largest_difference("cpu", torch.float32))
"""


def test_the_kernel_is_compared_with_what_it_should_compute() -> None:
    """By Triton's interpreter. Break seen: pages in their order, whatever the table says."""
    script = Script(DIFFERENCE, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert script.answer < 2e-6


@pytest.mark.parametrize("found", [(math.nan, 0.0), (0.0, math.nan)])
def test_no_difference_hides_behind_another(
    monkeypatch: pytest.MonkeyPatch, found: tuple[float, float]
) -> None:
    """Break seen: Python's `max`, which may drop a NaN."""
    differences = iter(found)
    monkeypatch.setattr(kernel, "_difference", lambda *_: next(differences))
    assert math.isnan(kernel.largest_difference("cpu", torch.float32))


@pytest.mark.parametrize(
    ("worst", "state"), [(0.003, "ok"), (0.004, "FAILED"), (math.nan, "FAILED")]
)
def test_only_a_kernel_that_is_right_is_well(
    monkeypatch: pytest.MonkeyPatch, worst: float, state: str
) -> None:
    monkeypatch.setattr(kernel, "largest_difference", lambda *_: worst)
    assert kernel.check_kernel().state == state


def test_a_kernel_that_does_not_run_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> float:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(kernel, "largest_difference", breaks)
    check = kernel.check_kernel()
    assert (check.state, check.found) == ("FAILED", "RuntimeError: no kernel image")
    assert "--orthorank-attention gather" in check.mend
