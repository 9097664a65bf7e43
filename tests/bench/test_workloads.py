"""What is made of the times at which tokens came."""

import pytest

from orthorank_vllm.bench.workloads import between_tokens


def test_a_stall_of_the_machine_does_not_count_as_the_time_between_tokens() -> None:
    """Break seen: the mean, 0.087 here."""
    assert between_tokens([0.0, 0.03, 0.06, 0.26]) == pytest.approx(0.03)
