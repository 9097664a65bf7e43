"""The kernel compiled for GPUs, by Triton's own compiler, which needs none."""

from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from orthorank_vllm.attention import paged_kernel
from orthorank_vllm.attention.paged_loop import SMALL_SHARED_MEMORY, WARPS, loop_of
from orthorank_vllm.attention.tiles import TILE_ROWS

# Compute capability, and shared memory of one program in bytes.
H100 = (90, 227 * 1024)
A100 = (80, 163 * 1024)
L4 = (89, SMALL_SHARED_MEMORY)
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv"}


def compiled(
    gpu: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    stored: torch.dtype | None = None,
    head: int = 128,
    **constants: Any,
) -> Any:
    """For pages of `stored`, aligned as vLLM's are."""
    capability, shared_memory = gpu
    keys, stages = loop_of(TILE_ROWS, head * dtype.itemsize, shared_memory)
    constants = {
        "PAGE": 16,
        "GROUP": 4,
        "HEAD": head,
        "HEAD_PADDED": head,
        "ROWS": TILE_ROWS,
        "KEYS": keys,
        "WINDOW": 0,
        "HAS_SCALES": False,
        "SCALE_PER_HEAD": False,
        "HAS_SOFTCAP": False,
        "HAS_PARTS": False,
        **constants,
    }
    pages = f"*{TYPES[stored or dtype]}"
    pointers = {
        "key_ptr": pages,
        "value_ptr": pages,
        "position_ptr": "*i64",
        "tile_ptr": "*i64",
        "table_ptr": "*i32",
        "key_scale_ptr": "*fp32",
        "value_scale_ptr": "*fp32",
        **dict.fromkeys(("partial_ptr", "sum_ptr"), "*fp32"),
        **dict.fromkeys(("output_ptr", "query_ptr"), f"*{TYPES[dtype]}"),
    }
    kernel: Any = paged_kernel._attend
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        is_number = name in ("scale", "softcap")
        signature[name] = pointers.get(name, "fp32" if is_number else "i32")
        if not is_number and name != "table_row":
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": WARPS, "num_stages": stages},
    )


@pytest.mark.parametrize(
    ("gpu", "options"),
    [
        (H100, {}),
        (H100, {"head": 64, "WINDOW": 4096, "PAGE": 64}),
        (H100, {"head": 256, "GROUP": 2}),
        (H100, {"dtype": torch.float32}),
        (H100, {"stored": torch.float8_e4m3fn, "HAS_SCALES": True, "SCALE_PER_HEAD": True}),
        (H100, {"GROUP": 3, "HAS_SOFTCAP": True}),
        (H100, {"HAS_PARTS": True}),
        (L4, {"head": 256, "GROUP": 2, "HAS_PARTS": True}),
        (A100, {}),
        (L4, {}),
        (L4, {"head": 256, "GROUP": 2}),
    ],
)
def test_it_compiles_and_its_pipeline_fits(gpu: tuple[int, int], options: dict[str, Any]) -> None:
    assert compiled(gpu, **options).metadata.shared <= gpu[1]


def test_on_an_h100_it_multiplies_by_the_large_tensor_cores_and_loads_ahead() -> None:
    assembly = compiled(H100).asm["ptx"]
    assert "wgmma.mma_async" in assembly
    assert "cp.async" in assembly
