"""Profiles of SmolLM2-135M's shape, made up."""

from typing import Any

from transformers import LlamaConfig

from orthorank_vllm.profiles import Entry, MeasuredRule, Profile, model_identity

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
WEIGHTS, OTHER_WEIGHTS = "a" * 64, "b" * 64
RULE = MeasuredRule(128, 64, has_stand_in=False)
WITH_STAND_IN = RULE._replace(has_stand_in=True)


def smollm2(**changed: Any) -> LlamaConfig:
    rope = {"rope_theta": 100000.0, "rope_type": "default"}
    return LlamaConfig(**{**SHAPE, "rope_parameters": rope, **changed})


def profile_of(config: LlamaConfig, **changed: Any) -> Profile:
    entries = (Entry(4, 0.0), Entry(2, 0.25))
    fields = {"entries": entries, "window": 128, "tail": 64, "weights": WEIGHTS, **changed}
    return Profile("mine", model_identity(config), **fields)
