"""Attention of selected queries against a loop over queries in float64."""

import pytest
import torch

from orthorank_vllm.attention.cpu import _attend_blocks


@pytest.mark.parametrize("sliding_window", [-1, 1, 40, 5000])
@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize(("length", "chunk"), [(700, 700), (900, 250), (5, 1)])
def test_selected_queries_see_the_keys_up_to_their_own_position(
    length: int, chunk: int, group_size: int, sliding_window: int
) -> None:
    """Breaks seen: one key too many; the window of a block's first query for all of it."""
    torch.manual_seed(0)
    num_kv_heads, head_size = 2, 32
    first = length - chunk
    chosen = torch.randperm(chunk)[: max(1, chunk // 2)].sort().values + first
    positions = torch.cat([chosen, chosen[-1:]])  # the last token may stand twice
    query = torch.randn(len(positions), num_kv_heads * group_size, head_size)
    keys = torch.randn(num_kv_heads, length, head_size)
    values = torch.randn(num_kv_heads, length, head_size)
    output = torch.full_like(query, torch.nan)

    _attend_blocks(query, keys, values, positions, 0.2, sliding_window, output)

    for row, position in enumerate(positions.tolist()):
        low = 0 if sliding_window < 0 else max(0, position - sliding_window + 1)
        for head in range(query.shape[1]):
            key = keys[head // group_size, low : position + 1].double()
            value = values[head // group_size, low : position + 1].double()
            weights = (key @ query[row, head].double() * 0.2).softmax(0)
            torch.testing.assert_close(
                output[row, head].double(), weights @ value, atol=2e-6, rtol=0
            )
