"""Quantised weights: Q, K and V come from the fused weight as it is, everything else as ever."""

import json
from pathlib import Path

import pytest

from tests.conftest import Prompts
from tests.models import WEIGHT_ONLY, write_w8a8
from tests.replay import SAFE_MARGIN, TOLERANCE
from tests.scripts import Script

pytestmark = pytest.mark.model

RULE = {"layers": [1, 3, 4]}
SERVE = """
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM
from tests.reference import Reference, Rule
from tests.replay import Engine, Job, replay
path, rule, options, prompts = arguments
engine = Engine(
    path, enforce_eager=True, max_model_len=1024, additional_config={"orthorank": rule}, **options
)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
quantize_(model.model, Int8WeightOnlyConfig(version=2))
jobs = [Job(prompt, max_tokens=2) for prompt in prompts]
run = engine.run(jobs, budget=lambda step: 200)
verdict = replay(run, Reference(model, Rule(tuple(rule["layers"]))))
method = engine.model.model.layers[0].self_attn.qkv_proj.quant_method
answer({
    "worst": verdict.worst,
    "compared": verdict.compared,
    "margin": verdict.margin,
    "method": type(method).__name__,
})
"""
OPTIONS = {
    "quantization": "torchao",
    "hf_overrides": {"quantization_config_dict_json": json.dumps(WEIGHT_ONLY)},
}
# Means of |differences| of a prompt's log-probabilities: dense and sparse, engine and reference.
SERVE_ROUNDED = """
import torch
from transformers import AutoModelForCausalLM
from tests.models import with_int8_layers
from tests.reference import Reference, Rule
from tests.replay import Engine, Job
path, float_path, rule, prompt = arguments
engine = Engine(path, enforce_eager=True, max_model_len=1024, additional_config={"orthorank": rule})
model = with_int8_layers(AutoModelForCausalLM.from_pretrained(float_path, dtype=torch.float32))

def served():
    job = Job(prompt)
    engine.run([job])
    told = job.output.prompt_logprobs[1:]
    return torch.tensor([entry[token].logprob for entry, token in zip(told, prompt[1:])])

def computed(*layers):
    log_probs = Reference(model, Rule(layers)).start(prompt).forward(0, len(prompt))[:-1]
    return log_probs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]

def mean(first, second):
    return float((first - second).abs().mean())

sparse = served()
method = engine.model.model.layers[0].self_attn.qkv_proj.quant_method
engine.llm.reset_prefix_cache()
engine.model.orthorank.plan = lambda batch: None
dense = served()
answer({
    "dense": mean(dense, computed()),
    "sparse": mean(sparse, computed(*rule["layers"])),
    "apart": mean(sparse, dense),
    "method": type(method).__name__,
})
"""


def test_eight_bit_weights_equal_the_reference(small_model_path: str, prompts: Prompts) -> None:
    taken = [prompts.take(length) for length in (300, 150)]
    answer = Script(SERVE, small_model_path, RULE, OPTIONS, taken).answer
    assert answer["method"] == "TorchAOLinearMethod"
    assert answer["margin"] > SAFE_MARGIN, "float noise chose: take other prompts"
    assert answer["worst"] < TOLERANCE
    assert answer["compared"] > 450


def test_eight_bit_activations_stay_near_the_reference(
    small_model_path: str, prompts: Prompts, tmp_path: Path
) -> None:
    """Near alone: an activation between two whole numbers is rounded by float noise, stock
    vLLM's too, and the rounded ones decide which tokens are selected."""
    path = write_w8a8(small_model_path, tmp_path / "w8a8")
    answer = Script(SERVE_ROUNDED, path, small_model_path, RULE, prompts.take(300)).answer
    assert answer["method"] == "CompressedTensorsLinearMethod"
    assert answer["dense"] < answer["apart"] / 20
    assert answer["sparse"] < answer["apart"] / 20
