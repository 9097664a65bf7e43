"""Q, K and V of a selective layer by parts of the fused weight."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orthorank_vllm.model.qkv import SlicedWeight, project

HEADS, KV_HEADS, HEAD_SIZE, HIDDEN = 6, 2, 16, 48


@pytest.mark.parametrize("bias", [False, True])
def test_views_of_the_weight_compute_what_the_whole_computes(bias: bool) -> None:
    """Break seen: the bias left whole."""
    torch.manual_seed(0)
    sizes = (HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE)
    fused = torch.nn.Linear(HIDDEN, sum(sizes), bias=bias).requires_grad_(False)
    attn: Any = SimpleNamespace(qkv_proj=fused, q_size=sizes[0], kv_size=sizes[1])
    normed = torch.randn(20, HIDDEN)
    rows = torch.tensor([3, 4, 11, 19, 19])
    split = SlicedWeight(attn)
    for _ in range(2):
        query, key, value = fused(normed).split(sizes, dim=-1)
        found = project(attn, split, normed)
        torch.testing.assert_close(found[0], key)
        torch.testing.assert_close(found[1], value)
        torch.testing.assert_close(found[2](rows, None), query[rows])
        # Weights that are loaded anew are found where they are.
        fused.weight = torch.nn.Parameter(torch.randn_like(fused.weight), requires_grad=False)
