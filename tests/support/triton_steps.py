"""Steps of a server whose kernels are not run: what Triton would have to compile for each.

The step's arrays are made and packed as for a GPU, and stay where they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from orthorank_vllm.attention import paged, paged_kernel, paged_merge, tiles
from orthorank_vllm.attention.backend import AttentionBackend, AttentionPlan
from orthorank_vllm.attention.stock import StockAttention
from orthorank_vllm.model import forward, lost_sinks
from orthorank_vllm.model.sinks import SinkTable
from orthorank_vllm.selection import topk_triton
from orthorank_vllm.selection.plan import Batch, Ints, make_plan
from orthorank_vllm.selection.topk import pack, unpack
from orthorank_vllm.selection.topk_triton import SegmentedTopKTriton
from tests.support.compilations import Compilations

HIDDEN, KEEPS, WINDOW, TAIL, PAGES = 64, (0.0, 1 / 3, 0.8), 128, 8, 64
# Keys that few queries share: some of a step's do, and others do not.
SPLIT_KEYS = 100
KERNELS = {paged_kernel: ["_attend"], paged_merge: ["_merge"], topk_triton: ["_score", "_select"]}
CPU = torch.device("cpu")


def layer(kv_heads: int = 2, group: int = 2, window: int = 0, **changes: Any) -> Any:
    """What is looked at in vLLM's `Attention`, as on an NVIDIA GPU, with pages."""
    head_size = changes.get("head_size", 16)
    pages = torch.zeros(PAGES, kv_heads, changes.pop("page", 16), 2 * head_size)
    impl = SimpleNamespace(
        scale=0.25,
        sliding_window=(window - 1, 0) if window else (-1, -1),
        logits_soft_cap=changes.pop("softcap", None),
        alibi_slopes=None,
        sinks=None,
    )
    settings = {"kv_cache_dtype": "auto", "head_size": head_size, "_k_scale": None, **changes}
    return SimpleNamespace(
        layer_name=f"layer {id(pages)}",
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        attn_backend=SimpleNamespace(get_name=lambda: "FLASH_ATTN"),
        impl=impl,
        kv_cache=pages,
        **settings,
    )


@contextmanager
def watched() -> Iterator[dict[str, Compilations]]:
    """What would be compiled of each kernel; nothing is launched meanwhile."""
    found = {
        name: Compilations(getattr(module, name))
        for module, names in KERNELS.items()
        for name in names
    }
    with ExitStack() as stack:
        for module, names in KERNELS.items():
            for name in names:
                stack.enter_context(mock.patch.object(module, name, found[name]))
        stack.enter_context(mock.patch.object(tiles, "SPLIT_KEYS", SPLIT_KEYS))
        packing = mock.patch.object(forward, "to_device", _packed)
        stack.enter_context(packing)
        stack.enter_context(mock.patch.object(forward, "_top_k_for", _by_kernels))
        yield found


def _packed(arrays: Sequence[Ints], device: torch.device) -> list[torch.Tensor]:
    return unpack(torch.from_numpy(pack(arrays)).clone(), arrays)


def _by_kernels(*_: Any) -> Any:
    return SegmentedTopKTriton


def _lost_states(decoder: Any, scored: Any, residual: torch.Tensor, _: Any) -> torch.Tensor:
    return torch.zeros(1, len(residual), HIDDEN)


def _embed(tokens: torch.Tensor, _: Any) -> torch.Tensor:
    return torch.zeros(len(tokens), HIDDEN)


def plan_attention(batch: Batch, rows: Ints | None) -> AttentionPlan:
    """Our kernel for whatever is not dense."""
    return StockAttention() if rows is None else paged.TritonAttention(batch, rows)


def run_step(batch: Batch, layers: Sequence[Any], sinks: SinkTable) -> bool:
    """Choose and attend in each layer at each keep; False where the step is a dense one."""
    plan = make_plan(batch, KEEPS, WINDOW, TAIL)
    if plan is None:
        return False
    decoder: Any = SimpleNamespace(layers={}, is_first=True, is_last=True, embed=_embed)
    with mock.patch.object(lost_sinks, "sink_states", _lost_states):
        way = AttentionBackend("triton", plan_attention)
        step = forward._start_step(decoder, {}, sinks, way, plan, CPU)
    residual = torch.zeros(plan.num_tokens, HIDDEN)
    for top_k in step.top_k.values():
        top_k.rows(residual, sinks.rows[0], step.sink_slots)
    # As wide as its longest request, whatever vLLM's is.
    width = int((batch.num_computed + batch.query_len).max()) // 16 + 1
    table = torch.zeros(len(batch.query_len), width, dtype=torch.int32)
    for attn in layers:
        context = (SimpleNamespace(block_table=table), attn, attn.kv_cache, None)
        with (
            mock.patch.object(paged, "get_attention_context", return_value=context),
            mock.patch.object(paged, "write_kv", return_value=None),
        ):
            for quota, attention in step.attention.items():
                rows = torch.zeros(quota.num_selected, dtype=torch.int64)
                query = torch.zeros(len(rows), attn.num_heads * attn.head_size)
                attention.run(attn, query, query, query, rows, rows)
    return True


def sink_table() -> SinkTable:
    """For one layer that scores."""
    return SinkTable(1, 70, HIDDEN, torch.float32, CPU)


def random_generator() -> np.random.Generator:
    """The same steps at each run."""
    return np.random.default_rng(0)
