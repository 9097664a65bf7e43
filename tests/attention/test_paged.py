"""Our kernel, run by Triton's interpreter, against a loop over queries in float64.

The cases are in `tests/support/paged_cases.py`. What this cannot show: bfloat16, which the
interpreter does not multiply, and anything about a real GPU (`tests/gpu/test_paged_kernel.py` runs
the same cases there).
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from orthorank_vllm.attention.backend import TRITON_FROM_CONTEXT, choose_backend
from orthorank_vllm.attention.paged import TritonAttention, window_of
from orthorank_vllm.attention.stock import GatherAttention, StockAttention
from orthorank_vllm.options import OptionError
from orthorank_vllm.selection.plan import Batch, profile_run_batches
from tests.support.paged_cases import CASES, ON_A_GPU, TOLERANCES
from tests.support.scripts import Script

RUN_CASES = """
from tests.attention import paged_views
from tests.support.paged_cases import CASES, run
found = {name: run(case) for name, case in CASES.items()}
found |= {f"views: {name}": paged_views.run(CASES[name]) for name in arguments}
answer(found)
"""
THROUGH_VIEWS = ("several requests", "a window of 40", "fp8 pages", "keys in parts")


@pytest.fixture(scope="module")
def differences() -> dict[str, float]:
    """Of each case, the largest: one process runs all, since Triton is told when it is imported."""
    script = Script(RUN_CASES, *THROUGH_VIEWS, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    found: dict[str, float] = script.answer
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_query_sees_the_keys_up_to_its_own_position(
    differences: dict[str, float], name: str
) -> None:
    """Breaks seen: V read beyond the last visible key; a window of one more; no mask within a
    tile; the mask left out one step too long; pages of 16 whatever they are; the last part's keys
    left out; parts weighted alike.
    """
    assert differences[name] < TOLERANCES[CASES[name].dtype]


@pytest.mark.parametrize("name", THROUGH_VIEWS)
def test_the_pages_are_read_by_vllms_views(differences: dict[str, float], name: str) -> None:
    assert differences[f"views: {name}"] < TOLERANCES[CASES[name].dtype]


def test_every_case_has_a_tolerance() -> None:
    assert {case.dtype for case in ON_A_GPU.values()} == set(TOLERANCES)


def layer(**changes: Any) -> Any:
    """What the choice looks at in vLLM's `Attention`, as on an NVIDIA GPU."""
    impl = SimpleNamespace(alibi_slopes=changes.pop("alibi_slopes", None), sinks=None)
    backend = changes.pop("backend", "FLASH_ATTN")
    values = {"kv_cache_dtype": "auto", "head_size": 128, **changes}
    return SimpleNamespace(
        attn_backend=SimpleNamespace(get_name=lambda: backend), impl=impl, **values
    )


def batch(context: int) -> Batch:
    one = np.ones(1, dtype=np.int64)
    return Batch(one * (context - 100), one * 100, one * context, one)


def test_long_contexts_take_the_kernel_and_short_ones_vllms_own() -> None:
    way = choose_backend("auto", [layer(), layer(kv_cache_dtype="fp8")], "cuda")
    rows = np.array([34])
    assert isinstance(way.plan(batch(TRITON_FROM_CONTEXT), rows), TritonAttention)
    assert isinstance(way.plan(batch(TRITON_FROM_CONTEXT - 1), rows), GatherAttention)
    assert isinstance(way.plan(batch(TRITON_FROM_CONTEXT), None), StockAttention)
    assert way.description == "triton from 4096 tokens of context, gather below"


def test_the_profile_run_attends_in_both_ways() -> None:
    """Each takes memory of its own. Break seen: a rehearsal of short contexts alone."""
    way = choose_backend("auto", [layer()], "cuda")
    kinds = [
        type(way.plan(rehearsed, rehearsed.query_len))
        for rehearsed in profile_run_batches(512, 16, [0.0], 64)
    ]
    assert kinds == [GatherAttention, TritonAttention]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"backend": "FLASHINFER"}, "the attention backend FLASHINFER"),
        ({"kv_cache_dtype": "nvfp4"}, "a KV cache of nvfp4"),
        ({"head_size": 512}, "heads of 512"),
        ({"alibi_slopes": [1.0]}, "ALiBi"),
    ],
)
def test_what_the_kernel_cannot_serve_is_gathered_and_never_forced(
    changes: dict[str, Any], named: str
) -> None:
    layers = [layer(), layer(**changes)]
    way = choose_backend("auto", layers, "cuda")
    assert isinstance(way.plan(batch(10**6), np.array([34])), GatherAttention)
    assert named in way.description
    with pytest.raises(OptionError, match=r"--orthorank-attention triton: .*" + named.split()[-1]):
        choose_backend("triton", layers, "cuda")


def test_either_way_can_be_forced() -> None:
    rows = np.array([34])
    forced = choose_backend("triton", [layer()], "cuda").plan(batch(200), rows)
    assert isinstance(forced, TritonAttention)
    gathered = choose_backend("gather", [layer()], "cuda").plan(batch(10**6), rows)
    assert isinstance(gathered, GatherAttention)


def test_a_window_counts_the_querys_own_key() -> None:
    assert window_of(SimpleNamespace(sliding_window=(-1, -1))) == 0
    assert window_of(SimpleNamespace(sliding_window=(4095, 0))) == 4096
