"""What is reckoned of what was measured."""

import pytest

from orthorank_vllm.bench.report import load_gain


def test_under_load_only_the_share_of_prefill_gains() -> None:
    assert load_gain(1, 1.4) == pytest.approx(1.4)
    assert load_gain(0, 1.4) == 1
    assert load_gain(0.5, 2) == pytest.approx(4 / 3)
