"""No step makes Triton compile what an earlier one did not need, or what was not compiled before.

Triton tells its compilations apart by types, by what is a multiple of 16, and by ones: in
mid-service each would take seconds.
"""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from orthorank_vllm.attention import paged_loop
from orthorank_vllm.attention.backend import choose_backend
from orthorank_vllm.engine.models import OrthoRankForCausalLM
from orthorank_vllm.selection.plan import profile_run_batches
from tests.support.random_batches import random_batch
from tests.support.triton_steps import (
    KEEPS,
    TAIL,
    layer,
    random_generator,
    run_step,
    sink_table,
    watched,
)

STEPS = 200


def test_steps_need_one_compilation_of_each_kernel_and_form() -> None:
    """Breaks seen: the number of candidates as Triton takes integers by default; arrays in one
    copy that begin wherever the one before ends; the block table's width.
    """
    random, sinks, layers = random_generator(), sink_table(), [layer()]
    sparse_steps = 0
    with watched() as compiled:
        while sparse_steps < STEPS:
            sparse_steps += run_step(random_batch(random), layers, sinks)
    assert {name: len(found.keys) for name, found in compiled.items()} == {
        # With and without keys in parts.
        "_attend": 2,
        "_merge": 1,
        "_score": 1,
        "_select": 1,
    }


def all_kinds() -> list[Any]:
    """Layers whose kernels differ, as they may within one model."""
    scale = torch.ones(())
    return [
        layer(),
        layer(window=40),
        layer(kv_heads=1, group=4),
        layer(softcap=30.0),
        layer(page=32),
        layer(kv_cache_dtype="fp8", _k_scale=scale, _v_scale=scale),
        layer(kv_cache_dtype="fp8", _k_scale=torch.ones(2), _v_scale=torch.ones(2)),
        layer(head_size=80),
    ]


def test_all_that_steps_need_of_the_attention_is_compiled_before_the_first() -> None:
    """Break seen: the kernel compiled by whatever layer and step came first."""
    random, sinks, layers = random_generator(), sink_table(), all_kinds()
    way = choose_backend("auto", layers, "cuda")
    assert way.compile is not None
    with watched() as compiled:
        assert way.compile(torch.float32)
        before = {name: set(compiled[name].keys) for name in ("_attend", "_merge")}
        # With and without keys in parts.
        assert len(before["_attend"]) == 2 * len(layers)
        while not run_step(random_batch(random), layers, sinks):
            pass
        for _ in range(20):
            run_step(random_batch(random), layers, sinks)
    assert {name: compiled[name].keys for name in before} == before


def test_nothing_is_compiled_while_there_is_no_kv_cache() -> None:
    """vLLM binds it between its profile run and what it runs to warm up."""
    attn = layer()
    way = choose_backend("auto", [attn], "cuda")
    assert way.compile is not None
    pages, attn.kv_cache = attn.kv_cache, torch.tensor([])
    with watched() as compiled:
        assert not way.compile(torch.float32)
        assert not compiled["_attend"].keys
        attn.kv_cache = pages
        assert way.compile(torch.float32)
        assert compiled["_attend"].keys


def test_the_profile_run_compiles_all_that_steps_need_of_the_selection() -> None:
    random, sinks = random_generator(), sink_table()
    with watched() as compiled:
        for batch in profile_run_batches(2048, 16, KEEPS, TAIL):
            assert run_step(batch, [], sinks)
        before = {name: set(found.keys) for name, found in compiled.items()}
        for _ in range(20):
            run_step(random_batch(random), [], sinks)
    assert before["_score"]
    assert before["_select"]
    assert {name: found.keys for name, found in compiled.items()} == before


class Prefill:
    """What a model asks its OrthoRank part for."""

    needs_warm_up, needs_profile_run, has_cache, compiled = True, False, False, 0
    shadow_rows = None

    def warm_up(self) -> None:
        self.compiled += self.has_cache
        self.needs_warm_up = not self.has_cache


class Stock:
    """A model of vLLM's, which is run at start-up."""

    def forward(self, *args: Any) -> torch.Tensor:
        return torch.zeros(1)


def test_whatever_runs_the_model_with_a_kv_cache_warms_it_up_once() -> None:
    """Break seen: a warm-up by forwards with a plan alone, of which Model Runner V1 makes none."""
    model: Any = type("Model", (OrthoRankForCausalLM, Stock), {})
    model = model.__new__(model)
    model.orthorank = Prefill()
    for model.orthorank.has_cache in (False, False, True, True):
        model.forward(None, torch.zeros(1))
    assert model.orthorank.compiled == 1


def test_the_driver_is_asked_once_how_much_memory_a_program_has() -> None:
    """Break seen: by each layer of each step."""
    paged_loop.shared_memory.cache_clear()
    device = torch.device("cuda", 0)
    found = SimpleNamespace(shared_memory_per_block_optin=1000)
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=found) as asked:
        assert [paged_loop.shared_memory(device) for _ in range(3)] == [1000] * 3
    assert asked.call_count == 1
    paged_loop.shared_memory.cache_clear()
