"""Small models of other families, as folders that vLLM serves.

Random ones, and SmolLM2's own weights under another family's name: a Mistral has the same tensors,
and a Mixtral whose experts are all copies of the MLP computes the same. And a quantised one.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from orthorank_vllm.model.fingerprint import Fingerprint

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
SCALES = {
    "residual_multiplier": 0.22,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
# The part of a config's class name before "Config", and what it needs besides the sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": 48},
    "Mixtral": {"num_local_experts": 4},
    "Qwen2": {},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 64, "mlp_only_layers": [1]},
    "Qwen3": {"head_dim": 64},
    "Qwen3Moe": {**EXPERTS, "head_dim": 32},
    "Granite": SCALES,
    "GraniteMoe": {**SCALES, "num_local_experts": 4},
    "Phi3": {},
}


def write_random(family: str, folder: Path, **sizes: int) -> str:
    """A model with random weights, large enough that its layers matter.

    Args:
        sizes: other than `SIZES`.
    """
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**{**SIZES, **FAMILIES[family], **sizes})
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.08)
        else:
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.1)
    model.save_pretrained(folder)
    return str(folder)


def write_untrained(model_path: str, folder: Path) -> str:
    """A model with random weights, a checkpoint and a tokenizer like any other."""
    torch.manual_seed(5)
    config = transformers.AutoConfig.from_pretrained(model_path)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model_path).save_pretrained(folder)
    return str(folder)


def fingerprint_of(folder: str) -> str | None:
    """That of the weights in a model's only file."""
    fingerprint = Fingerprint()
    for _ in fingerprint.noting(load_file(f"{folder}/model.safetensors").items()):
        pass
    return fingerprint.value


def write_as_mistral(model_path: str, folder: Path, sliding_window: int) -> str:
    """SmolLM2 as a Mistral."""
    shutil.copytree(model_path, folder, copy_function=_link)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": sliding_window,
    }
    _replace(folder / "config.json", json.dumps(config))
    return str(folder)


def write_as_mixtral(model_path: str, folder: Path, experts: int) -> str:
    """A Llama as a Mixtral whose experts are all its MLP."""
    dense = transformers.LlamaForCausalLM.from_pretrained(model_path)
    config = transformers.MixtralConfig(
        **{
            **{key: getattr(dense.config, key) for key in SIZES},
            "rope_parameters": dense.config.rope_parameters,
            "rms_norm_eps": dense.config.rms_norm_eps,
            "tie_word_embeddings": dense.config.tie_word_embeddings,
            "head_dim": dense.config.hidden_size // dense.config.num_attention_heads,
            "num_local_experts": experts,
            "sliding_window": None,
        }
    )
    mixture = transformers.MixtralForCausalLM(config)
    mixture.load_state_dict(dense.state_dict(), strict=False)
    for layer, other in zip(mixture.model.layers, dense.model.layers, strict=True):
        gate_up = torch.cat([other.mlp.gate_proj.weight, other.mlp.up_proj.weight])
        layer.mlp.experts.gate_up_proj.data[:] = gate_up
        layer.mlp.experts.down_proj.data[:] = other.mlp.down_proj.weight
    mixture.save_pretrained(folder)
    return str(folder)


# torchao's scheme of 8-bit weights, which vLLM can make while it loads a model.
WEIGHT_ONLY = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}

# Of 127: processors without VNNI add two products in 16 bits, which larger weights overflow.
LARGEST_WEIGHT = 63


class Int8Linear(torch.nn.Module):
    """A linear layer of 8-bit weights and activations: scales per output and per token.

    Arithmetic on whole numbers in float32, so that only the rounding of activations depends on
    float noise.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scale = weight.abs().amax(dim=1, keepdim=True) / LARGEST_WEIGHT
        self.whole = (weight / self.scale).round()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        scale = rows.abs().amax(dim=-1, keepdim=True) / 127
        product = (rows / scale).round() @ self.whole.T
        return product * scale * self.scale.T


def with_int8_layers(model: Any) -> Any:
    """The model, its decoder's linear layers replaced."""
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, module in list(block.named_children()):
                if isinstance(module, torch.nn.Linear):
                    setattr(block, name, Int8Linear(module))
    return model


def write_w8a8(model_path: str, folder: Path) -> str:
    """A Llama as a checkpoint of 8-bit weights and activations (compressed-tensors)."""
    shutil.copytree(model_path, folder, copy_function=_link)
    tensors = load_file(folder / "model.safetensors")
    model = with_int8_layers(transformers.LlamaForCausalLM.from_pretrained(model_path))
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            tensors[f"{name}.weight"] = module.whole.to(torch.int8)
            tensors[f"{name}.weight_scale"] = module.scale
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme},
    }
    _replace(folder / "config.json", json.dumps(config))
    return str(folder)


def _link(source: str, target: str) -> None:
    Path(target).symlink_to(source)


def _replace(path: Path, content: str) -> None:
    path.unlink()
    path.write_text(content)
