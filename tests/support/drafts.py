"""Draft models with random weights: heads for a small target, whose guesses are worth nothing."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# Before these layers an EAGLE-3 head reads a target of six: its embeddings, and its end.
READ_LAYERS = (0, 3, 6)
GUESSES = 3
SCALE = 0.08


def write_eagle(target: str, folder: Path) -> str:
    """An EAGLE head: one layer over a token and the target's last state."""
    config = _config_of(target)
    width = config["hidden_size"]
    weights = {"fc.weight": _drawn(width, 2 * width)}
    weights |= _layer(config, "layers.0", read=width)
    del weights["layers.0.input_layernorm.weight"]
    return _write(folder, config, "LlamaForCausalLM", weights)


def write_eagle3(target: str, folder: Path) -> str:
    """An EAGLE-3 head: one layer over a token and three of the target's states."""
    config = _config_of(target)
    width = config["hidden_size"]
    config |= {
        "draft_vocab_size": config["vocab_size"],
        "eagle_aux_hidden_state_layer_ids": READ_LAYERS,
    }
    weights = {
        "fc.weight": _drawn(width, len(READ_LAYERS) * width),
        "norm.weight": torch.ones(width),
        "lm_head.weight": _drawn(config["vocab_size"], width),
        "midlayer.hidden_norm.weight": torch.ones(width),
    }
    weights |= _layer(config, "midlayer", read=2 * width)
    return _write(folder, config, "LlamaForCausalLMEagle3", weights)


def write_medusa(target: str, folder: Path) -> str:
    """Medusa's heads: each guesses one token from the state that the last one was sampled from."""
    vocabulary, width = _config_of(target)["vocab_size"], _config_of(target)["hidden_size"]
    weights = {}
    for head in range(GUESSES):
        weights[f"blocks.{head}.layers.0.weight"] = _drawn(width, width)
        weights[f"lm_heads.{head}.weight"] = _drawn(vocabulary, width)
    config = {
        "model_type": "medusa",
        "hidden_size": width,
        "vocab_size": vocabulary,
        "num_heads": GUESSES,
        "num_hidden_layers": 1,
    }
    return _write(folder, config, "MedusaModel", weights)


def _config_of(target: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((Path(target) / "config.json").read_text())
    return {**config, "num_hidden_layers": 1, "attention_bias": False, "mlp_bias": False}


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * SCALE


def _layer(config: dict[str, Any], name: str, read: int) -> dict[str, torch.Tensor]:
    """One layer of Llama's, whose attention reads so wide a state."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    of_keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (width, read),
        "self_attn.k_proj": (of_keys, read),
        "self_attn.v_proj": (of_keys, read),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    weights = {f"{name}.{part}.weight": _drawn(*shape) for part, shape in shapes.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        weights[f"{name}.{norm}.weight"] = torch.ones(width)
    return weights


def _write(
    folder: Path, config: dict[str, Any], architecture: str, weights: dict[str, torch.Tensor]
) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
