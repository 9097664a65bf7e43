"""LoRA adapters with random weights, as folders that vLLM loads, and models that they are added to.

In PEFT's format, written and read without PEFT.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERYWHERE = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
EMBEDDING = "embed_tokens"
RANK = 8
# By which PEFT multiplies what an adapter adds.
SCALE = 2.0
PREFIX = "base_model.model."


def write_adapter(
    model: Any, folder: Path, seed: int, rank: int = RANK, modules: Sequence[str] = EVERYWHERE
) -> str:
    """An adapter of some of a model's layers that changes each of them by about a third.

    Args:
        model: of transformers.
        modules: names of linear layers, and `EMBEDDING`.
    """
    numbers = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=numbers) * scale

    tensors = {}
    for name, weight in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer.rpartition(".")[2] not in modules:
            continue
        weight = weight.detach()
        rows, columns = weight.shape
        of_up = float(weight.std()) * (columns / rank) ** 0.5 / (3 * SCALE)
        if layer.endswith(EMBEDDING):
            of_up = float(weight.std()) / (3 * SCALE * rank**0.5)
            tensors[f"{PREFIX}{layer}.lora_embedding_A"] = drawn(rank, rows, scale=1.0)
            tensors[f"{PREFIX}{layer}.lora_embedding_B"] = drawn(columns, rank, scale=of_up)
            continue
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = drawn(rank, columns, scale=columns**-0.5)
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = drawn(rows, rank, scale=of_up)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": SCALE * rank,
        "target_modules": list(modules),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def merge(model: Any, folder: str) -> Any:
    """Add an adapter to a model's own weights."""
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    for name, weight in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        down = tensors.get(f"{PREFIX}{layer}.lora_A.weight")
        embedded = tensors.get(f"{PREFIX}{layer}.lora_embedding_A")
        if kind != "weight":
            continue
        if down is not None:
            weight.data += SCALE * tensors[f"{PREFIX}{layer}.lora_B.weight"] @ down
        elif embedded is not None:
            weight.data += SCALE * (tensors[f"{PREFIX}{layer}.lora_embedding_B"] @ embedded).T
    return model
