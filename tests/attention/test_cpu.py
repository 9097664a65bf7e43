"""Attention of selected queries over real pages, against a loop over queries in float64."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from orthorank_vllm.attention import cpu, sdpa
from orthorank_vllm.attention.cpu import CpuAttention
from orthorank_vllm.selection.plan import Batch, Ints, make_plan

current_platform.import_kernels()

BLOCK_SIZE, KV_HEADS, HEAD_SIZE, SCALE = 32, 2, 64, 0.2


class Pages:
    """Random K and V of some requests, in pages in a random order."""

    def __init__(self, lengths: list[int]) -> None:
        torch.manual_seed(0)
        blocks = [-(-length // BLOCK_SIZE) for length in lengths]
        order = torch.randperm(sum(blocks)).int() + 1
        # vLLM zeroes new pages for this kernel, which reads them to their ends.
        self.cache = torch.zeros(sum(blocks) + 1, KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
        self.table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
        self.keys, self.values = [], []
        halves = self.cache.view(-1, KV_HEADS, 2 * BLOCK_SIZE, HEAD_SIZE).chunk(2, dim=2)
        for request, length in enumerate(lengths):
            count = blocks[request]
            self.table[request, :count] = order[:count]
            order = order[count:]
            key, value = torch.randn(2, length, KV_HEADS, HEAD_SIZE)
            position = torch.arange(length)
            slots = self.table[request, position // BLOCK_SIZE].long() * BLOCK_SIZE
            slots += position % BLOCK_SIZE
            ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, "vec")
            self.keys.append(key)
            self.values.append(value)


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("keep", [1 / 3, 0.0])
@pytest.mark.parametrize("sliding_window", [-1, 7, 40, 5000])
@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize(
    "requests",
    [
        [(0, 300, 300)],
        [(200, 150, 351)],
        # The last of them without a selected row, if none is kept.
        [(0, 40, 40), (60, 40, 101), (200, 50, 900)],
        # Rows that adjoin, positions that adjoin, requests that do not: 9 then 10.
        [(0, 10, 10), (10, 40, 60)],
        [(0, 90, 90), (77, 1, 40), (33, 65, 98), (5, 1, 5), (0, 1, 70), (0, 40, 20)],
    ],
)
def test_every_query_sees_the_keys_of_its_own_request_up_to_its_position(
    requests: list[tuple[int, int, int]],
    group_size: int,
    sliding_window: int,
    keep: float,
    in_blocks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Breaks seen: runs that cross requests; one key too many."""
    if in_blocks:
        attend_in_blocks(monkeypatch)
    computed, query_len, prompt_len = np.array(requests).T
    plan = make_plan(Batch(computed, query_len, prompt_len, computed), [keep], 128, 3)
    assert plan is not None
    [quota] = plan.different_quotas
    chosen = plan.candidates[quota.top_k_slots]
    rows = torch.from_numpy(np.sort(np.concatenate([chosen, plan.forced_rows])))
    check(plan.batch, rows, quota.selected_per_request, group_size, sliding_window, monkeypatch)


@pytest.mark.parametrize(
    "requests", [[(0, 300, 300)], [(0, 90, 90), (77, 1, 40), (0, 1, 5), (33, 65, 98), (0, 40, 20)]]
)
def test_all_queries_in_blocks_see_the_same(
    requests: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    attend_in_blocks(monkeypatch)
    computed, query_len, prompt_len = np.array(requests).T
    batch = Batch(computed, query_len, prompt_len, computed)
    check(batch, torch.arange(query_len.sum()), query_len, 3, -1, monkeypatch)


def attend_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine would do, and however short the requests are."""
    monkeypatch.setattr(cpu, "IN_BLOCKS", True)
    monkeypatch.setattr(sdpa, "MIN_TOKENS", 1)
    monkeypatch.setattr(sdpa, "MIN_TOKENS_SELECTED", 1)
    monkeypatch.setattr(sdpa, "BLOCK_ROWS", 16)


def check(
    batch: Batch,
    rows: torch.Tensor,
    rows_per_request: Ints,
    group_size: int,
    sliding_window: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Attention of these rows of the batch is what the loop below says."""
    request = torch.from_numpy(np.repeat(np.arange(len(batch.query_len)), batch.query_len))[rows]
    first_row = torch.from_numpy(np.cumsum(batch.query_len) - batch.query_len)
    positions = rows - first_row[request] + torch.from_numpy(batch.num_computed)[request]

    pages = Pages((batch.num_computed + batch.query_len).tolist())
    key, value = (
        torch.cat([kept[start:] for kept, start in zip(all_kept, batch.num_computed, strict=True)])
        for all_kept in (pages.keys, pages.values)
    )
    query = torch.randn(len(positions), KV_HEADS * group_size, HEAD_SIZE)
    attn: Any = SimpleNamespace(
        layer_name="layer",
        num_heads=KV_HEADS * group_size,
        num_kv_heads=KV_HEADS,
        head_size=HEAD_SIZE,
        isa="vec",
        kv_cache_dtype="auto",
        impl=SimpleNamespace(
            scale=SCALE,
            sliding_window=sliding_window,
            alibi_slopes=None,
            logits_soft_cap=0,
            sinks=None,
        ),
    )
    metadata = SimpleNamespace(block_table=pages.table)
    context = (metadata, attn, pages.cache, None)
    monkeypatch.setattr(cpu, "get_attention_context", lambda name: context)

    monkeypatch.setattr(cpu, "write_kv", lambda *_: None)  # they are in their pages
    output = (
        CpuAttention(batch, rows_per_request)
        .run(attn, query.flatten(1), key.flatten(1), value.flatten(1), rows, positions)
        .view_as(query)
    )

    for row, (position, owner) in enumerate(zip(positions.tolist(), request.tolist(), strict=True)):
        low = 0 if sliding_window < 0 else max(0, position - sliding_window + 1)
        for head in range(query.shape[1]):
            seen = slice(low, position + 1)
            keys = pages.keys[owner][seen, head // group_size].double()
            values = pages.values[owner][seen, head // group_size].double()
            weights = (keys @ query[row, head].double() * SCALE).softmax(0)
            torch.testing.assert_close(
                output[row, head].double(), weights @ values, atol=1e-5, rtol=0
            )
