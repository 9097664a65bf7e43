"""The selection without a sort, as a GPU computes it; see `tests/support/selection_cases.py`."""

from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from orthorank_vllm.selection import topk_triton
from orthorank_vllm.selection.topk_triton import LARGEST_WINDOW, SCORE_COLUMNS, SCORE_ROWS
from tests.support.ptxas import use_of
from tests.support.scripts import Script

COMPARE = """
from tests.support.selection_cases import differing, share_that_differs
found = [line for seed in range(arguments[0]) for line in differing(seed)]
answer([found, share_that_differs("cpu", tokens=700, hidden=600)])
"""


def test_the_kernels_select_what_the_sort_selects() -> None:
    """Guards against: ties to the higher position; the places of another keep."""
    found, share = Script(COMPARE, 40, TRITON_INTERPRET="1", OMP_NUM_THREADS="1").answer
    assert found == []
    assert share == 0


def compiled(kernel: str, types: dict[str, str], constants: dict[str, int], capability: int) -> Any:
    """Of arrays that begin at 16 bytes, as those of a step do."""
    function: Any = getattr(topk_triton, kernel)
    signature, aligned = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = types.get(name, "*i64")
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize(
    ("kernel", "types", "constants"),
    [
        (
            "_score",
            {"score_ptr": "*fp32", "residual_ptr": "*bf16", "sink_ptr": "*bf16"},
            {"ROWS": SCORE_ROWS, "COLUMNS": SCORE_COLUMNS},
        ),
        ("_select", {"score_ptr": "*fp32"}, {"SIZE": 128}),
        ("_select", {"score_ptr": "*fp32"}, {"SIZE": LARGEST_WINDOW}),
    ],
)
def test_the_kernels_compile_and_all_that_they_hold_fits_into_registers(
    kernel: str, types: dict[str, str], constants: dict[str, int], capability: int
) -> None:
    """Break seen: a window of 512, of which 12 KB a thread go to memory."""
    found = use_of(compiled(kernel, types, constants, capability), capability)
    assert found.spilled == 0, found


def test_a_sort_is_left_to_windows_too_large_to_compare_all_with_all() -> None:
    import numpy as np

    from orthorank_vllm.model.forward import _top_k_for
    from orthorank_vllm.selection.plan import Batch, make_plan
    from orthorank_vllm.selection.topk import SegmentedTopK

    length = np.array([900])
    for window, kind in (
        (0, SegmentedTopK),
        (LARGEST_WINDOW + 1, SegmentedTopK),
        (LARGEST_WINDOW, topk_triton.SegmentedTopKTriton),
    ):
        plan = make_plan(Batch(0 * length, length, length, length), [1 / 3], window, 64)
        assert plan is not None
        assert _top_k_for(plan, torch.device("cuda")) is kind
        assert _top_k_for(plan, torch.device("cpu")) is SegmentedTopK
