"""A model's sizes, read off its configuration."""

from transformers import LlamaConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from orthorank_vllm.flops import Shapes

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}


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
