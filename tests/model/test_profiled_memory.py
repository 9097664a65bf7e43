"""vLLM sizes its KV cache by what the profile run takes: no step may take more."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from orthorank_vllm.attention import paged
from orthorank_vllm.attention.backend import AttentionBackend
from orthorank_vllm.attention.paged_merge import partials
from orthorank_vllm.attention.tiles import MOST_PARTIALS
from orthorank_vllm.model import forward
from orthorank_vllm.model.decoder import DecoderLayer
from orthorank_vllm.model.forward import SelectiveLayer, sparse_forward
from orthorank_vllm.model.sinks import SinkTable
from orthorank_vllm.model.stand_in import FusedStandIn, StandIn
from orthorank_vllm.selection.plan import Batch, make_plan, profile_run_batches
from tests.support.peak_memory import peak_of
from tests.support.triton_steps import layer as triton_layer

# Few tokens for many requests: what is kept for each request, and each lost sink, shows.
TOKENS, REQUESTS, HIDDEN, LAYERS, RANK, WINDOW = 512, 256, 64, 40, 8, 128
CPU = torch.device("cpu")


class Attend:
    """An `AttentionPlan` that takes no more than its output."""

    def run(self, attn: Any, query: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.zeros_like(query)

    def write(self, *_: Any) -> None:
        """Nothing is kept."""


def norm(states: torch.Tensor, update: torch.Tensor | None = None) -> Any:
    """As vLLM's: with an update, that of the sum and the sum."""
    if update is None:
        return states / (states.norm(dim=-1, keepdim=True) + 1)
    update += states
    return update / (update.norm(dim=-1, keepdim=True) + 1), update


def linear(rows: int, columns: int) -> Any:
    weight = torch.randn(rows, columns) / rows**0.5
    return lambda states: (states @ weight, None)


def layer() -> DecoderLayer:
    """One of a small Llama: as many heads as KV heads, no rotation."""
    size, up, down = HIDDEN, linear(HIDDEN, 6 * HIDDEN), linear(3 * HIDDEN, HIDDEN)
    attn = SimpleNamespace(
        qkv_proj=linear(size, 3 * size),
        o_proj=linear(size, size),
        q_size=size,
        kv_size=size,
        head_dim=size,
        attn=SimpleNamespace(
            num_heads=1, num_kv_heads=1, head_size=size, kv_cache_dtype="auto", layer_name=""
        ),
    )

    def feed_forward(states: torch.Tensor) -> torch.Tensor:
        gate, up_states = up(states)[0].chunk(2, dim=-1)
        output: torch.Tensor = down(silu(gate) * up_states)[0]
        return output

    return DecoderLayer(norm, attn, norm, feed_forward, None, None, None, 1.0)


class Model:
    """A decoder whose layers all but the first and the last are selective."""

    def __init__(self, keep: float, tail: int) -> None:
        torch.manual_seed(0)
        self.keep, self.tail = keep, tail
        self.decoder: Any = SimpleNamespace(
            layers={index: layer() for index in range(LAYERS)},
            last_layer=LAYERS - 1,
            is_first=True,
            is_last=True,
            told_layers=(),
            embed=lambda tokens, adapters: torch.randn(len(tokens), HIDDEN),
        )
        self.selective = {
            index: SelectiveLayer(index - 1, index - 1 if keep else None, stand_in=stand_in())
            for index in range(1, LAYERS - 1)
        }
        self.sinks = SinkTable(LAYERS - 2 if keep else 0, 2 * REQUESTS, HIDDEN, torch.float32, CPU)

    def peak(self, batch: Batch) -> int:
        """Bytes that a step takes; 0 for a dense one, which is stock vLLM's."""
        plan = make_plan(batch, [self.keep] * (LAYERS - 2), WINDOW, self.tail)
        if plan is None:
            return 0
        way = AttentionBackend("none", lambda *_: Attend())
        positions = torch.zeros(plan.num_tokens, dtype=torch.int64)

        def step() -> None:
            sparse_forward(
                self.decoder,
                self.selective,
                self.sinks,
                way,
                plan,
                positions,
                torch.randn(plan.num_tokens, HIDDEN),
                None,
            )

        found = peak_of(step)
        self.sinks.clear()
        return found


def stand_in() -> FusedStandIn:
    parts = torch.randn(HIDDEN, RANK), torch.randn(RANK, HIDDEN), torch.randn(HIDDEN)
    return StandIn(*parts).fused(torch.device("cpu"), torch.float32)


def of_every_ratio(made: Batch) -> Batch:
    """Its requests skip in no layer, in one, in two, and so on."""
    return replace(made, num_selective=np.arange(len(made.query_len)) % (LAYERS - 1))


def batch(*requests: tuple[int, int, int], reads_all: bool = True) -> Batch:
    """(tokens computed, tokens in this forward, prompt length) of each request."""
    computed, query_len, prompt_len = np.array(requests, dtype=np.int64).T
    # Every request begins with a token of its own.
    return Batch(computed, query_len, prompt_len, np.arange(len(requests)), reads_all)


def steps() -> dict[str, Batch]:
    """Each with all the tokens that there can be."""
    last = TOKENS - REQUESTS + 1
    return {
        "one prompt": batch((0, TOKENS, TOKENS)),
        "a late chunk": batch((8000, TOKENS, 9000)),
        "an answer computed again after a preemption": batch((0, TOKENS, 80)),
        "many prompts": batch(*[(0, 8, 8)] * (TOKENS // 8)),
        "many late chunks, all sinks lost": batch(*[(400, 2, 900)] * REQUESTS),
        "many cached prompts, all sinks lost": batch(*[(400, 2, 402)] * REQUESTS),
        "a prompt beside much decoding": batch(*[(900, 1, 5)] * (REQUESTS - 1), (0, last, last)),
        "guesses to verify beside a prompt": batch(*[(900, 4, 5)] * 100, (0, 112, 112)),
        "many prompts of every ratio": of_every_ratio(batch(*[(0, 8, 8)] * (TOKENS // 8))),
        "late chunks of every ratio": of_every_ratio(batch(*[(400, 12, 900)] * (TOKENS // 12))),
        "only what is sampled is read": batch((0, TOKENS, TOKENS), reads_all=False),
    }


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other rank to agree with."""
    monkeypatch.setattr(forward, "of_first_rank", lambda rows: rows)


@pytest.mark.parametrize("tail", [1, 64])
@pytest.mark.parametrize("keep", [0.0, 1 / 3, 0.9])
def test_no_step_takes_more_memory_than_the_profile_run(keep: float, tail: int) -> None:
    """Breaks seen: many prompts alone, which select fewer rows than an answer computed again; all
    lost sinks at once, whose states take more than a step.
    """
    model = Model(keep, tail)
    most = max(
        model.peak(rehearsed)
        for rehearsed in profile_run_batches(TOKENS, REQUESTS, [keep] * (LAYERS - 2), tail)
    )
    # What the host makes of the arrays of a plan is less than this.
    allowed = most * 1.01
    assert {
        name: found for name, step in steps().items() if (found := model.peak(step)) > allowed
    } == {}


def test_the_sink_table_is_a_part_of_what_the_profile_run_takes() -> None:
    """Break seen: the table made with the layers, which at a start-up's choice is after loading."""
    model = Model(1 / 3, 64)
    first, again = (
        [model.peak(rehearsed) for rehearsed in profile_run_batches(TOKENS, REQUESTS, [1 / 3], 64)]
        for _ in range(2)
    )
    assert first[0] - again[0] == model.sinks.rows.nbytes


def test_the_profile_run_takes_what_attention_to_keys_in_parts_does() -> None:
    """There is no cache yet, and nothing is attended to. Break seen: nothing taken."""
    attn = triton_layer(kv_heads=2, group=2)
    context = (None, attn, attn.kv_cache, None)
    ones = np.ones(1, dtype=np.int64)
    attention = paged.TritonAttention(Batch(ones, ones, ones, ones), ones)
    query = torch.zeros(1, attn.num_heads * attn.head_size)
    rows = torch.zeros(1, dtype=torch.int64)
    with (
        mock.patch.object(paged, "get_attention_context", return_value=context),
        mock.patch.object(paged, "write_kv", return_value=None),
    ):
        taken = peak_of(lambda: attention.run(attn, query, query, query, rows, rows))
    most = sum(part.nbytes for part in partials(MOST_PARTIALS, attn.num_heads, attn.head_size, CPU))
    assert taken >= most
