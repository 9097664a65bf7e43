"""Whether the attention kernel is right on this machine's GPU."""

import numpy as np
import torch

from orthorank_vllm.attention.paged_kernel import PagedCache, attend
from orthorank_vllm.attention.tiles import SPLIT_KEYS, make_tiles, queries_per_tile
from orthorank_vllm.doctor.check import Check, failed, ok

WHAT = "attention kernel"
MEND = "Serve with --orthorank-attention gather, and report this"
# Of an output whose values are about 1, in half floats.
TOLERANCE = 3e-3
PAGE = 16
HEADS, KV_HEADS, HEAD_SIZE = 8, 2, 128


def check_kernel() -> Check:
    """A third of a chunk's queries, and one that decodes, over pages in any order, in float64."""
    try:
        worst = largest_difference("cuda", torch.float16)
    except Exception as error:  # whatever Triton, its compiler or the driver raise
        return failed(WHAT, f"{type(error).__name__}: {error}".partition("\n")[0], MEND)
    # NaN is no agreement.
    if not worst <= TOLERANCE:
        return failed(WHAT, f"differs from float64 by {worst:.1g}, {TOLERANCE} is allowed", MEND)
    return ok(WHAT, f"within {worst:.1g} of float64 on this GPU")


def largest_difference(device: str, dtype: torch.dtype) -> float:
    """The kernel's outputs from those of torch, computed in float64 on the CPU."""
    differences = [
        _difference(300, torch.arange(300, 512, 3), device, dtype),
        # Of so long a context the keys are shared among programs.
        _difference(3 * SPLIT_KEYS - 1, torch.tensor([3 * SPLIT_KEYS - 1]), device, dtype),
    ]
    # Unlike Python's, torch's is NaN if one of them is.
    return float(torch.tensor(differences, dtype=torch.float64).max())


def _difference(context: int, positions: torch.Tensor, device: str, dtype: torch.dtype) -> float:
    draw = torch.Generator().manual_seed(0)
    length = -(-int(positions.max() + 1) // PAGE) * PAGE
    query = torch.randn(len(positions), HEADS, HEAD_SIZE, generator=draw).to(dtype)
    both = torch.randn(length, KV_HEADS, 2 * HEAD_SIZE, generator=draw).to(dtype)
    key, value = (kept.double().transpose(0, 1) for kept in both.split(HEAD_SIZE, dim=-1))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double().transpose(0, 1),
        key,
        value,
        attn_mask=torch.arange(length) <= positions[:, None],
        enable_gqa=True,
    ).transpose(0, 1)

    pages = both.view(-1, PAGE, KV_HEADS, 2 * HEAD_SIZE).flip(0).to(device)
    key_pages, value_pages = pages.split(HEAD_SIZE, dim=-1)
    table = torch.arange(len(pages) - 1, -1, -1, dtype=torch.int32, device=device)[None]
    tiles = make_tiles(
        np.array([len(positions)]),
        np.array([context]),
        np.array([length - context]),
        queries_per_tile(HEADS // KV_HEADS),
        torch.device(device),
    )
    output = attend(
        query.to(device),
        positions.to(device),
        tiles,
        PagedCache(key_pages, value_pages, table),
        HEAD_SIZE**-0.5,
        0,
        0.0,
    )
    return float((output.cpu().double() - expected).abs().max())
