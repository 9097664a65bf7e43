"""Models to check with: small ones with random weights, and a large one's shapes without any."""

import json
from pathlib import Path
from typing import Any

import torch

# Layers of the small models that the check makes selective, of four.
SELECTIVE = (1, 2)
SMALL = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    # Heads of 128, a window, and experts, in one.
    "Mixtral": {"num_local_experts": 4, "head_dim": 128, "sliding_window": 1024},
}
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def write_small(family: str, folder: Path) -> Path:
    """A model with random weights, large enough that every part of it matters to its outputs.

    Args:
        family: one of `FAMILIES`.
    """
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**SMALL, **FAMILIES[family]})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, weight in model.named_parameters():
        if "embed" in name:
            torch.nn.init.normal_(weight, std=1.0)
        elif weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        else:
            torch.nn.init.normal_(weight, mean=1.0, std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_large(folder: Path, config: dict[str, Any] | None = None) -> Path:
    """The configuration of Llama 3 8B alone, its context longer; vLLM makes up the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or LLAMA_3_8B, indent=1))
    return folder
