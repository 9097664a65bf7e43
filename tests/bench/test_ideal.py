"""The ideal: operations counted from shapes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from orthorank_vllm.bench.ideal import load_gain, prefill
from orthorank_vllm.flops import Shapes

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


def test_a_dense_prompt_costs_what_torch_counts() -> None:
    # torch does not count its fused attention on a CPU.
    model = LlamaForCausalLM._from_config(CONFIG, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, TOKENS, dtype=torch.int64), logits_to_keep=1)
    # torch counts every key for every query; a causal kernel skips the later ones.
    per_key = 4 * CONFIG.num_attention_heads * CONFIG.head_dim * CONFIG.num_hidden_layers
    later = per_key * TOKENS * (TOKENS - 1) / 2
    # The table of rotary angles is one small product, which we leave out.
    assert prefill(Shapes.of(CONFIG), TOKENS) == pytest.approx(
        counter.get_total_flops() - later, rel=1e-3
    )


def test_a_selective_layer_costs_k_and_v_for_all_and_the_rest_for_the_updated_ones() -> None:
    shapes = Shapes.of(CONFIG)
    dense = prefill(shapes, TOKENS)
    sparse = prefill(shapes, TOKENS, selective=2, window=0, wants_all_rows=True)
    # ceil(40 / 3) = 14, and the last token.
    updated = 15
    key_value = 2 * 64 * 2 * 2 * 24
    head = 2 * 64 * 300
    per_layer = (dense - head) / 5
    rest_per_token = per_layer / TOKENS - key_value
    expected = 3 * per_layer + 2 * (TOKENS * key_value + updated * rest_per_token) + head
    assert sparse == pytest.approx(expected)
    # Of the last layer only one row is read.
    unread = (TOKENS - 1) * rest_per_token
    assert prefill(shapes, TOKENS, selective=2, window=0) == pytest.approx(sparse - unread)


def test_the_shipped_models_linear_layers_gain_what_their_shapes_allow() -> None:
    """0.938 of a SmolLM2 layer's weights are not K's and V's: 1 / (1 - 0.311 x 0.938)."""
    smollm2 = Shapes(30, 576, 9, 3, 64, 1536, vocabulary=0)
    # So many tokens that rounding up is nothing; heads of size 0 would be no attention at all.
    tokens = 128 * 300
    dense = prefill(smollm2, tokens)
    attention = 30 * 4.0 * 576 * (tokens + 1) / 2 * tokens
    saved = dense - prefill(smollm2, tokens, selective=14, wants_all_rows=True)
    saved_attention = attention * 14 / 30 * (1 - 43 / 128)
    gain = (dense - attention) / (dense - attention - (saved - saved_attention))
    assert gain == pytest.approx(1 / (1 - 0.311 * 0.938), rel=5e-3)


def test_experts_count_as_many_as_a_token_meets() -> None:
    dense = Shapes(1, 64, 4, 4, 16, 128, vocabulary=0)
    mixture = Shapes(1, 64, 4, 4, 16, 128, vocabulary=0, experts=8, experts_per_token=2)
    mlp, router = 2 * 64 * 128 * 3, 2 * 64 * 8
    assert prefill(mixture, 10) - prefill(dense, 10) == 10 * (mlp + router)


def test_under_load_only_the_share_of_prefill_gains() -> None:
    assert load_gain(1, 1.4) == pytest.approx(1.4)
    assert load_gain(0, 1.4) == 1
    assert load_gain(0.5, 2) == pytest.approx(4 / 3)
