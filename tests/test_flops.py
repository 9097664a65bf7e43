"""Operations: of a model's sizes, of a prompt, and those that a plan saves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from orthorank_vllm.flops import Shapes, flops_saved, prefill_flops
from orthorank_vllm.selection.plan import Batch, Plan, make_plan
from orthorank_vllm.selection.quotas import Quota

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    vocab_size=300,
)
TOKENS = 40


def mlp(shapes: Shapes) -> float:
    """Operations of one token in the MLP or its experts, the router left out."""
    without = Shapes(**{**vars(shapes), "intermediate": 0, "shared_intermediate": 0})
    return shapes.update(1) - without.update(1)


def test_a_dense_mlp_is_met_whole() -> None:
    shapes = Shapes.of(LlamaConfig(**SIZES, intermediate_size=176))
    assert mlp(shapes) == 2 * 64 * 176 * 3
    assert shapes.head_size == 16


def test_of_mixtrals_experts_a_token_meets_some() -> None:
    config = MixtralConfig(**SIZES, intermediate_size=176, num_local_experts=8)
    assert mlp(Shapes.of(config)) == 2 * (2 * 64 * 176 * 3)


def test_qwens_experts_have_a_size_of_their_own() -> None:
    """Break seen: the size of its dense MLP, which no token meets, taken for each expert's."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    config = Qwen3MoeConfig(**SIZES, **experts, intermediate_size=176)
    assert mlp(Shapes.of(config)) == 2 * (2 * 64 * 40 * 3)


def test_a_shared_expert_is_met_as_well() -> None:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    config = Qwen2MoeConfig(**SIZES, **experts, shared_expert_intermediate_size=100)
    assert mlp(Shapes.of(config)) == 2 * (2 * 64 * 40 * 3) + 2 * 64 * 100 * 3


def test_a_dense_prompt_costs_what_torch_counts() -> None:
    # torch does not count its fused attention on a CPU.
    model = LlamaForCausalLM._from_config(CONFIG, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, TOKENS, dtype=torch.int64), logits_to_keep=1)
    # torch counts every key for every query; a causal kernel skips the later ones.
    per_key = 4 * CONFIG.num_attention_heads * CONFIG.head_dim * CONFIG.num_hidden_layers
    later = per_key * TOKENS * (TOKENS - 1) / 2
    # The table of rotary angles is one small product, which we leave out.
    assert prefill_flops(Shapes.of(CONFIG), TOKENS) == pytest.approx(
        counter.get_total_flops() - later, rel=1e-3
    )


THIRD = 1 / 3


def plan_of(
    tokens: int, computed: int = 0, prompt_len: int = 0, window: int = 128, tail: int = 1
) -> Plan:
    """Of a chunk; without the prompt's length, of a prompt whose every row is read."""
    first = np.zeros(1, dtype=np.int64)
    batch = Batch(first + computed, first + tokens, first + (prompt_len or tokens), first)
    keeps = [THIRD, 0.0]
    plan = make_plan(replace(batch, wants_all_rows=not prompt_len), keeps, window, tail)
    assert plan is not None
    return plan


def with_quotas(plan: Plan, layers: dict[int, float]) -> dict[int, Quota | None]:
    """Of each layer by its keep, as `plan_of` has them."""
    of_keep = dict(zip([THIRD, 0.0], plan.quotas, strict=True))
    return {layer: of_keep[keep] for layer, keep in layers.items()}


def saved_by(plan: Plan, shapes: Shapes, layers: dict[int, float], last: int | None) -> float:
    return flops_saved(plan, shapes, with_quotas(plan, layers), last)


def test_a_selective_layer_costs_k_and_v_for_all_and_the_rest_for_the_updated_ones() -> None:
    shapes = Shapes.of(CONFIG)
    layers = {1: THIRD, 3: 0.0}
    dense = prefill_flops(shapes, TOKENS)
    sparse = dense - saved_by(plan_of(TOKENS, window=0, tail=6), shapes, layers, 4)
    # ceil(33 / 3) = 11, position 0 and the tail; or these alone.
    updated = 11 + 7 + 7
    key_value = 2 * 64 * 2 * 2 * 24
    head = 2 * 64 * 300
    per_layer = (dense - head) / 5
    rest_per_token = per_layer / TOKENS - key_value
    expected = 3 * per_layer + 2 * TOKENS * key_value + updated * rest_per_token + head
    assert sparse == pytest.approx(expected)
    # Of the last layer only one row is read.
    unread = (TOKENS - 1) * rest_per_token
    assert prefill_flops(shapes, TOKENS, layers, window=0, tail=6) == pytest.approx(sparse - unread)


def test_a_selective_last_layer_saves_what_any_last_layer_does() -> None:
    """Guards against: counted twice, as selective and as the last."""
    shapes = Shapes.of(CONFIG)
    plan = plan_of(128, prompt_len=128)
    for layers in ({4: 0.0}, {4: THIRD}, {}):
        assert saved_by(plan, shapes, layers, 4) == pytest.approx(127 * shapes.update(64.5))
    # A stage without it, and rows that are all read.
    assert saved_by(plan, shapes, {4: 0.0}, None) == pytest.approx(126 * shapes.update(64.5))
    assert saved_by(plan_of(128), shapes, {4: 0.0}, 4) == pytest.approx(126 * shapes.update(64.5))


@pytest.mark.parametrize("tokens", [1, 2, 64, 65])
def test_a_prompt_that_is_all_tail_costs_what_it_does_in_stock_vllm(tokens: int) -> None:
    shapes = Shapes.of(CONFIG)
    assert prefill_flops(shapes, tokens, {1: 0.0}) == prefill_flops(shapes, tokens)
    assert prefill_flops(shapes, 66, {1: 0.0}) < prefill_flops(shapes, 66)


def test_the_linear_layers_of_a_real_model_gain_what_their_shapes_allow() -> None:
    """0.938 of a SmolLM2 layer's weights are not K's and V's: 1 / (1 - 0.311 x 0.938)."""
    smollm2 = Shapes(30, 576, 9, 3, 64, 1536, vocabulary=0)
    # So many tokens that rounding up is nothing; heads of size 0 would be no attention at all.
    tokens = 128 * 300
    dense = prefill_flops(smollm2, tokens)
    attention = 30 * 4.0 * 576 * (tokens + 1) / 2 * tokens
    saved = saved_by(plan_of(tokens), smollm2, dict.fromkeys(range(14), THIRD), 29)
    saved_attention = attention * 14 / 30 * (1 - 43 / 128)
    gain = (dense - attention) / (dense - attention - (saved - saved_attention))
    assert gain == pytest.approx(1 / (1 - 0.311 * 0.938), rel=5e-3)


def test_experts_count_as_many_as_a_token_meets() -> None:
    dense = Shapes(1, 64, 4, 4, 16, 128, vocabulary=0)
    mixture = Shapes(1, 64, 4, 4, 16, 128, vocabulary=0, experts=8, experts_per_token=2)
    mlp, router = 2 * 64 * 128 * 3, 2 * 64 * 8
    assert prefill_flops(mixture, 10) - prefill_flops(dense, 10) == 10 * (mlp + router)


def test_a_later_chunk_saves_more_as_its_queries_see_more_keys() -> None:
    shapes = Shapes.of(CONFIG)
    layers = {1: THIRD, 2: THIRD}
    early = saved_by(plan_of(128, computed=128, prompt_len=999), shapes, layers, None)
    late = saved_by(plan_of(128, computed=512, prompt_len=999), shapes, layers, None)
    skipped = 2 * (128 - 43)
    assert late - early == pytest.approx(skipped * 4 * 4 * 24 * (512 - 128))
