"""Read a request's K and V back out of vLLM's CPU pages.

How the CPU kernels order a page's elements is not documented and differs by
instruction set, so it is measured: one scratch page is written by vLLM's own op
and looked at. vllm/v1/attention/backends/cpu_attn.py, csrc/cpu/cpu_attn_*.hpp.
"""

from functools import lru_cache

import torch
from vllm import _custom_ops as ops

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32}


class PageReader:
    """Pages of one shape, dtype and instruction set.

    `key_order` and `value_order`: [block size x head size], for each element in
    (token, channel) order its offset in the page's storage; None where that is
    the storage order, or its transpose (`key_transposed`).
    """

    def __init__(self, isa: str, block_size: int, head_size: int, dtype: torch.dtype) -> None:
        numbers = torch.arange(block_size * head_size)
        # As bits, different integers are exact in any dtype, whatever they mean as floats.
        bits = numbers.to(_INTEGER_OF_SIZE[dtype.itemsize])
        tokens = bits.view(dtype).view(block_size, 1, head_size)
        page = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
        key_page, value_page = page.chunk(2, dim=2)
        slots = torch.arange(block_size, dtype=torch.int64)
        ops.cpu_attn_reshape_and_cache(tokens, tokens, key_page, value_page, slots, isa)
        self._shape = (block_size, head_size)
        self._key_order = _order_of(key_page)
        self._value_order = _order_of(value_page)
        transposed = numbers.view(block_size, head_size).T.flatten().argsort()
        self._key_transposed = torch.equal(self._key_order, transposed)
        self._value_plain = torch.equal(self._value_order, numbers)

    @classmethod
    def of(cls, isa: str, kv_cache: torch.Tensor) -> "PageReader":
        """The reader for `kv_cache`, [blocks, kv heads, block size, 2 x head size]."""
        return _reader(isa, kv_cache.shape[2], kv_cache.shape[3] // 2, kv_cache.dtype)

    def read(
        self, kv_cache: torch.Tensor, block_table: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            kv_cache: [blocks, kv heads, block size, 2 x head size].
            block_table: [at least length / block size] one request's blocks.
            length: tokens to read, from position 0.

        Returns:
            K and V, each [kv heads, length, head size].
        """
        block_size, head_size = self._shape
        blocks = block_table[: -(-length // block_size)].long()
        num_blocks, num_kv_heads = kv_cache.shape[:2]
        halves = kv_cache.view(num_blocks, num_kv_heads, 2, -1)
        key = halves[blocks, :, 0]
        if self._key_transposed:
            key = key.view(len(blocks), num_kv_heads, head_size, block_size).transpose(2, 3)
        else:
            key = key[..., self._key_order].view(len(blocks), num_kv_heads, *self._shape)
        value = halves[blocks, :, 1]
        if not self._value_plain:
            value = value[..., self._value_order]
        value = value.view(len(blocks), num_kv_heads, *self._shape)
        return _join(key, length), _join(value, length)


def _join(pages: torch.Tensor, length: int) -> torch.Tensor:
    """[blocks, kv heads, block size, head size] to [kv heads, length, head size]."""
    return pages.transpose(0, 1).flatten(1, 2)[:, :length]


@lru_cache
def _reader(isa: str, block_size: int, head_size: int, dtype: torch.dtype) -> PageReader:
    return PageReader(isa, block_size, head_size, dtype)


def _order_of(page: torch.Tensor) -> torch.Tensor:
    integer = _INTEGER_OF_SIZE[page.dtype.itemsize]
    unsigned = page.reshape(-1).view(integer).long() % (1 << 8 * page.dtype.itemsize)
    order = unsigned.argsort()
    if not torch.equal(unsigned[order], torch.arange(len(unsigned))):
        raise RuntimeError(
            "OrthoRank cannot read this CPU's KV cache: vLLM's kernel does not keep every "
            "element of K and V in its page"
        )
    return order
