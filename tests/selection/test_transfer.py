"""Host arrays on their way to the device; the copy itself needs a GPU."""

import numpy as np
import pytest
import torch

from orthorank_vllm.selection.transfer import to_device


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
        ),
    ],
)
def test_every_array_arrives_whole_and_in_order(device: str) -> None:
    arrays = [np.arange(n, dtype=np.int64) * (n + 1) for n in (3, 0, 1, 40)]
    found = to_device(arrays, torch.device(device))
    assert [tensor.tolist() for tensor in found] == [array.tolist() for array in arrays]
    assert {tensor.dtype for tensor in found} == {torch.int64}
