"""The kernel's cases through vLLM's own form of the pages; run by Triton's interpreter."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from orthorank_vllm.attention import paged
from orthorank_vllm.attention.paged_kernel import PagedCache
from orthorank_vllm.selection.plan import Batch, Ints
from tests.support.paged_cases import SCALE, Case, difference


def run(case: Case) -> float:
    """`difference` of `TritonAttention`."""

    def attend_as_a_layer(
        batch: Batch,
        rows_per_request: Ints,
        query: torch.Tensor,
        positions: torch.Tensor,
        cache: PagedCache,
    ) -> torch.Tensor:
        both = torch.cat([cache.key, cache.value], dim=-1).transpose(1, 2)
        attn: Any = SimpleNamespace(
            layer_name="layer",
            num_heads=case.heads,
            num_kv_heads=case.kv_heads,
            head_size=case.head_size,
            kv_cache_dtype="fp8" if case.fp8 else "auto",
            _k_scale=cache.key_scale,
            _v_scale=cache.value_scale,
            impl=SimpleNamespace(
                scale=SCALE,
                sliding_window=(case.window - 1, 0) if case.window else (-1, -1),
                logits_soft_cap=case.softcap,
            ),
        )
        if case.fp8:
            both = both.view(torch.uint8)
        context = (SimpleNamespace(block_table=cache.block_table), attn, both, None)
        way = paged.TritonAttention(batch, rows_per_request)
        with (
            mock.patch.object(paged, "get_attention_context", return_value=context),
            mock.patch.object(paged, "write_kv", return_value=None),
        ):
            output = way.run(attn, query.flatten(1), query, query, positions, positions)
        return output.view_as(query)

    return difference(case, attend_as_a_layer)
