"""Quantised weights: Q, K and V come from the fused weight as it is, everything else as ever."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Prompts
from tests.support.models import WEIGHT_ONLY, write_w8a8
from tests.support.replay import SAFE_MARGIN, TOLERANCE
from tests.support.scripts import Script

pytestmark = pytest.mark.model

RULE = {"layers": [[1, 1 / 3], [3, 0], [4, 1 / 3]], "window": 128, "tail": 16}
SERVE = """
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM
from tests.support.reference import Reference, Rule
from tests.support.replay import Engine, Job, replay
path, rule, options, prompts = arguments
engine = Engine(
    path, enforce_eager=True, max_model_len=1024, additional_config={"orthorank": rule}, **options
)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
quantize_(model.model, Int8WeightOnlyConfig(version=2))
jobs = [Job(prompt, max_tokens=2) for prompt in prompts]
run = engine.run(jobs, budget=lambda step: 200)
verdict = replay(run, Reference(model, Rule.of(rule)))
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
# And of the sink's state in the batch, and recomputed.
SERVE_ROUNDED = """
import torch
from transformers import AutoModelForCausalLM
from orthorank_vllm.model.lost_sinks import sink_states
from tests.support.models import with_int8_layers
from tests.support.reference import Reference, Rule
from tests.support.replay import Engine, Job
path, float_path, rule, options, prompt = arguments
engine = Engine(
    path, enforce_eager=True, max_model_len=1024, additional_config={"orthorank": rule}, **options
)
model = AutoModelForCausalLM.from_pretrained(float_path, dtype=torch.float32)
if path != float_path:
    model = with_int8_layers(model)
cache_dtype = torch.float8_e4m3fn if options else None

def served():
    job = Job(prompt)
    engine.run([job])
    told = job.output.prompt_logprobs[1:]
    return torch.tensor([entry[token].logprob for entry, token in zip(told, prompt[1:])])

def computed(layers):
    options = {**rule, "layers": layers, "cache_dtype": cache_dtype}
    reference = Reference(model, Rule.of(options))
    log_probs = reference.start(prompt).forward(0, len(prompt))[:-1]
    return log_probs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]

def mean(first, second):
    return float((first - second).abs().mean())

sparse = served()
orthorank = engine.model.orthorank
[slot], _ = orthorank._sinks.reserve([(prompt[0], 0)])
met = orthorank._sinks.rows[:, slot]
scored = [layer for layer, keep in rule["layers"] if keep]
decoder = orthorank._decoder
recomputed = sink_states(decoder, scored, decoder.embed(torch.tensor(prompt[:1])))[:, 0]
layer = engine.model.model.layers[0].self_attn
engine.llm.reset_prefix_cache()
orthorank.is_paused = True
dense = served()
answer({
    "dense": mean(dense, computed([])),
    "sparse": mean(sparse, computed(rule["layers"])),
    "apart": mean(sparse, dense),
    "sink": float((met - recomputed).norm() / met.norm()),
    "method": type(layer.qkv_proj.quant_method).__name__,
    "cache": str(layer.attn.kv_cache.dtype),
})
"""


def check_near(answer: dict[str, Any]) -> None:
    """Near alone: a number between two that can be stored is rounded by float noise, in stock
    vLLM too, and the rounded ones decide which tokens are selected."""
    assert answer["dense"] < answer["apart"] / 20
    assert answer["sparse"] < answer["apart"] / 20
    assert answer["sink"] < 0.01


def test_eight_bit_weights_equal_the_reference(small_model_path: str, prompts: Prompts) -> None:
    taken = [prompts.take(length) for length in (300, 150)]
    answer = Script(SERVE, small_model_path, RULE, OPTIONS, taken).answer
    assert answer["method"] == "TorchAOLinearMethod"
    assert answer["margin"] > SAFE_MARGIN, "float noise chose: take other prompts"
    assert answer["worst"] < TOLERANCE
    assert answer["compared"] > 450


@pytest.mark.skipif(
    torch.cpu._is_amx_tile_supported(), reason="vLLM's int8 products by AMX take no float32"
)
def test_eight_bit_activations_stay_near_the_reference(
    small_model_path: str, prompts: Prompts, tmp_path: Path
) -> None:
    path = write_w8a8(small_model_path, tmp_path / "w8a8")
    answer = Script(SERVE_ROUNDED, path, small_model_path, RULE, {}, prompts.take(300)).answer
    assert answer["method"] == "CompressedTensorsLinearMethod"
    check_near(answer)


@pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's fp8 KV cache on CPU needs AVX-512"
)
def test_an_eight_bit_kv_cache_stays_near_the_reference(
    small_model_path: str, prompts: Prompts
) -> None:
    path, options = small_model_path, {"kv_cache_dtype": "fp8"}
    answer = Script(SERVE_ROUNDED, path, path, RULE, options, prompts.take(300)).answer
    assert answer["cache"] == "torch.uint8"
    check_near(answer)
