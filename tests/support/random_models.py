"""Small models with random weights in which every layer and every key matters."""

from pathlib import Path
from typing import Any

import torch

# Of their four layers, those that are made selective: a choice of tokens, and none.
SELECTIVE = "1:1/3,2:0"
TAIL = 16
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


def write_small(family: str, folder: Path) -> str:
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
    return str(folder)
