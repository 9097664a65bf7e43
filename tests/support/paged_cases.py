"""Calls of the paged kernel, each compared with a loop over queries in float64.

On a GPU as it is, elsewhere by Triton's interpreter (TRITON_INTERPRET=1, set before Triton is
imported, so in a process of its own), which does not multiply bfloat16.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch

from orthorank_vllm.attention import tiles
from orthorank_vllm.attention.paged_kernel import PagedCache, attend
from orthorank_vllm.selection.plan import Batch, Ints

SCALE = 0.15


@dataclass(frozen=True)
class Case:
    """One call of the kernel.

    Attributes:
        requests: context, tokens of this forward, and whether they are all selected (a third is
            otherwise, the last always).
        is_hnd: pages with the heads outside, and not with the slots outside.
        split_keys: keys beyond which few queries share them among programs; 0: as it is.
    """

    requests: tuple[tuple[int, int, bool], ...] = ((0, 150, False),)
    heads: int = 4
    kv_heads: int = 1
    head_size: int = 64
    page: int = 16
    is_hnd: bool = False
    window: int = 0
    softcap: float = 0.0
    dtype: str = "float32"
    fp8: str = ""
    split_keys: int = 0


Attend = Callable[[Batch, Ints, torch.Tensor, torch.Tensor, PagedCache], torch.Tensor]


def run(case: Case, device: str = "cpu") -> float:
    """`difference` of the kernel."""

    def attend_in_tiles(
        batch: Batch,
        rows_per_request: Ints,
        query: torch.Tensor,
        positions: torch.Tensor,
        cache: PagedCache,
    ) -> torch.Tensor:
        size = tiles.queries_per_tile(case.heads // case.kv_heads)
        return attend(
            query,
            positions,
            tiles.make_tiles(
                rows_per_request, batch.num_computed, batch.query_len, size, query.device
            ),
            cache,
            SCALE,
            case.window,
            case.softcap,
        )

    return difference(case, attend_in_tiles, device)


def difference(case: Case, attend_in: Attend, device: str = "cpu") -> float:
    """The largest one of an output from the loop's, infinite if there is a NaN."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    context, query_len, _ = (np.array(column) for column in zip(*case.requests, strict=True))
    cache, keys, values = _pages(case, (context + query_len).tolist(), device)
    selected = [_selected(*request) for request in case.requests]
    rows_per_request = np.array([len(rows) for rows in selected])
    positions = torch.cat(selected)
    owners = np.repeat(np.arange(len(selected)), rows_per_request)
    query = torch.randn(len(positions), case.heads, case.head_size).to(dtype)

    batch = Batch(context, query_len, context + query_len, context)
    with mock.patch.object(tiles, "SPLIT_KEYS", case.split_keys or tiles.SPLIT_KEYS):
        output = attend_in(batch, rows_per_request, query.to(device), positions.to(device), cache)
    output = output.cpu()

    group = case.heads // case.kv_heads
    worst = 0.0
    for row, (position, owner) in enumerate(zip(positions.tolist(), owners, strict=True)):
        low = max(0, position - case.window + 1) if case.window else 0
        key = keys[owner][low : position + 1].repeat_interleave(group, dim=1)
        value = values[owner][low : position + 1].repeat_interleave(group, dim=1)
        scores = torch.einsum("nhd,hd->hn", key, query[row].double()) * SCALE
        if case.softcap:
            scores = case.softcap * (scores / case.softcap).tanh()
        expected = torch.einsum("hn,nhd->hd", scores.softmax(1), value)
        largest = float((output[row].double() - expected).abs().max())
        worst = max(worst, largest if largest == largest else float("inf"))
    return worst


def _selected(context: int, query_len: int, is_all: bool) -> torch.Tensor:
    """Positions: all; or a random third and the last twice, as a prompt's last that also won."""
    positions = torch.arange(context, context + query_len)
    if is_all:
        return positions
    chosen = torch.rand(query_len) < 1 / 3
    chosen[-1] = True
    return torch.cat([positions[chosen], positions[-1:]])


def _pages(
    case: Case, lengths: list[int], device: str
) -> tuple[PagedCache, list[torch.Tensor], list[torch.Tensor]]:
    """K and V in pages in a random order, what was not written NaN; and as float64 by request.

    As vLLM lays them out: K and V of a slot side by side, seen as [pages, kv heads, slots, both].
    """
    counts = [-(-length // case.page) for length in lengths]
    order = torch.randperm(sum(counts)) + 1
    dtype = getattr(torch, case.dtype)
    inner = (case.page, case.kv_heads) if not case.is_hnd else (case.kv_heads, case.page)
    raw = torch.full((sum(counts) + 1, *inner, 2 * case.head_size), torch.nan, dtype=dtype)
    key_pages, value_pages = _views(case, raw)
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = None, None
    if case.fp8:
        heads = case.kv_heads if case.fp8 == "per head" else 1
        scales = (torch.rand(heads) + 0.5, torch.rand(heads) + 0.5)
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for request, length in enumerate(lengths):
        table[request, : counts[request]] = order[: counts[request]].int()
        order = order[counts[request] :]
        position = torch.arange(length)
        page, slot = table[request, position // case.page].long(), position % case.page
        for kept, pages, scale in zip(
            (keys, values), (key_pages, value_pages), scales, strict=True
        ):
            written = torch.randn(length, case.kv_heads, case.head_size).to(dtype)
            if case.fp8:
                written = written.to(torch.float8_e4m3fn).to(dtype)
            pages[page, slot] = written
            kept.append(written.double() * (1 if scale is None else scale.double()[:, None]))
    if case.window:
        # Pages that left every window hold what another request wrote there, or nothing.
        for request, (context, _, _) in enumerate(case.requests):
            gone = max(0, context - case.window + 1) // case.page
            table[request, :gone] = 0
    # All at once: a copy of the views alone would be laid out anew.
    stored = raw.to(device).to(torch.float8_e4m3fn if case.fp8 else dtype)
    cache = PagedCache(
        *_views(case, stored),
        table.to(device),
        *(None if scale is None else scale.to(device) for scale in scales),
    )
    return cache, keys, values


def _views(case: Case, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as [pages, page size, kv heads, head size], as vLLM's backends see them."""
    paged = raw if case.is_hnd else raw.transpose(1, 2)
    key, value = paged.transpose(1, 2).split(case.head_size, dim=-1)
    return key, value


MIXED = (
    *((0, 40, False), (61, 1, True), (33, 50, False)),
    *((0, 1, True), (90, 3, True), (17, 9, False)),
)

CASES = {
    "one prompt": Case(),
    "pages of 32, heads outside": Case(page=32, is_hnd=True),
    "pages of 64": Case(page=64),
    "several requests": Case(MIXED, kv_heads=2),
    "several requests, heads outside": Case(MIXED, kv_heads=2, is_hnd=True, page=32),
    "a request of one token": Case(((0, 1, True),)),
    "one decoding request": Case(((130, 1, True),), kv_heads=2),
    "every query has its own KV head": Case(((0, 70, False),), heads=2, kv_heads=2),
    "eight queries to a KV head": Case(((20, 90, False),), heads=8),
    "three queries to a KV head": Case(MIXED, heads=3),
    "heads of 128": Case(((0, 70, False),), heads=2, head_size=128),
    "heads of 80": Case(((0, 40, False),), heads=2, head_size=80),
    "a window of 40": Case(MIXED, window=40),
    "a window of 7, heads outside": Case(((100, 60, False),), window=7, is_hnd=True),
    "a window longer than all": Case(((9, 60, False),), window=500),
    "capped scores": Case(((0, 60, False),), softcap=2.0),
    "sixteen bits": Case(MIXED, dtype="float16"),
    "fp8 pages": Case(MIXED, kv_heads=2, fp8="one scale", dtype="float16"),
    "keys in parts": Case(MIXED, kv_heads=2, split_keys=20),
    "keys in parts, one decoding request": Case(((300, 1, True),), kv_heads=2, split_keys=70),
    "keys in parts, more of them than keys": Case(((3, 2, True),), split_keys=1),
    "keys in parts, guesses to verify": Case(((190, 5, True), (0, 60, False)), split_keys=64),
    "keys in parts, a window of 40": Case(MIXED, window=40, split_keys=20),
    "keys in parts, heads of 80": Case(MIXED, head_size=80, heads=3, split_keys=30),
    "keys in parts, capped scores": Case(((200, 3, True),), softcap=2.0, split_keys=64),
    "keys in parts, sixteen bits": Case(MIXED, dtype="float16", split_keys=40),
    "keys in parts, fp8 pages": Case(
        MIXED, kv_heads=2, fp8="per head", dtype="float16", split_keys=30
    ),
    "fp8 pages, a scale for each head": Case(MIXED, kv_heads=2, fp8="per head", page=32),
}


# Of an output, whose values are about 1: half floats keep 11 bits, bfloat16 8.
TOLERANCES = {"float32": 2e-6, "float16": 3e-3, "bfloat16": 2e-2}
_LARGE = {
    "a long prompt's chunk": Case(
        ((3000, 500, False), (0, 700, False)), heads=32, kv_heads=8, head_size=128
    ),
    "a long context that decodes": Case(((9000, 1, True),), heads=32, kv_heads=8, head_size=128),
    "heads of 256": Case(((0, 300, False),), heads=8, kv_heads=4, head_size=256),
}
# With what the interpreter is too slow for, and what it cannot compute.
ON_A_GPU = {
    **CASES,
    **_LARGE,
    **{
        f"{name}, bfloat16": replace(case, dtype="bfloat16")
        for name, case in {**CASES, **_LARGE}.items()
        if case.dtype == "float16" or name in _LARGE
    },
}
