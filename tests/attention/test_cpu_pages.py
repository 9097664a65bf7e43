"""K and V read back from pages that vLLM's own kernel wrote."""

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from orthorank_vllm.attention.cpu_pages import PageReader

current_platform.import_kernels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("isa", "block_size", "head_size"),
    [("vec", 32, 64), ("vec", 128, 64), ("vec", 32, 128), ("vec", 128, 256), ("vec16", 16, 80)],
)
def test_what_was_written_is_read_back(
    isa: str, block_size: int, head_size: int, dtype: torch.dtype
) -> None:
    """Break seen: keys read as if they were not transposed."""
    length, num_kv_heads = 2 * block_size + 5, 3
    cache = torch.randn(7, num_kv_heads, block_size, 2 * head_size).to(dtype)
    key = torch.randn(length, num_kv_heads, head_size).to(dtype)
    value = torch.randn(length, num_kv_heads, head_size).to(dtype)
    table = torch.tensor([4, 2, 6, 0, 0], dtype=torch.int32)
    positions = torch.arange(length)
    slots = table[positions // block_size].long() * block_size + positions % block_size
    halves = cache.view(7, num_kv_heads, 2 * block_size, head_size).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, isa)

    read_key, read_value = PageReader.of(isa, cache).read(cache, table, length)

    assert torch.equal(read_key, key.transpose(0, 1))
    assert torch.equal(read_value, value.transpose(0, 1))
