"""The kernels on a GPU: attention against a loop in float64, the selection against a sort."""

import pytest

from orthorank_vllm.doctor.check import OK
from orthorank_vllm.doctor.kernel import check_kernel
from tests.support.paged_cases import ON_A_GPU, TOLERANCES, run
from tests.support.selection_cases import share_that_differs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ON_A_GPU)
def test_every_query_sees_the_keys_up_to_its_own_position(name: str) -> None:
    case = ON_A_GPU[name]
    assert run(case, "cuda") < TOLERANCES[case.dtype]


def test_a_long_prompts_rows_are_those_of_the_sort() -> None:
    """Two scores may be equal but for the order of their sums."""
    assert share_that_differs("cuda") <= 2e-3


def test_the_doctor_finds_the_kernel_right() -> None:
    check = check_kernel()
    assert check.state == OK, check.found
