"""The pruned model that a benchmark compares with."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from orthorank_vllm.bench.pruned_checkpoint import write_pruned
from orthorank_vllm.options import OptionError


def test_the_pruned_model_is_the_model_without_its_last_layers(
    small_model_path: str, tmp_path: Path
) -> None:
    write_pruned(Path(small_model_path), tmp_path, 2)
    model = AutoModelForCausalLM.from_pretrained(small_model_path)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.model.layers = model.model.layers[:4]
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(pruned(tokens).logits, model(tokens).logits)
    assert pruned.config.num_hidden_layers == 4
    assert (tmp_path / "tokenizer.json").read_bytes()


def test_a_name_that_is_no_folder_cannot_be_pruned(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--against prune: org/model is no folder"):
        write_pruned(Path("org/model"), tmp_path, 2)
