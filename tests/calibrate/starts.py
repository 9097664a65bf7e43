"""Engines that choose their layers when they start, and start again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orthorank_vllm.profiles import Profile, read_profile
from tests.calibrate.small_sizes import SMALL_SIZES
from tests.support.scripts import Script

START = f"""
{SMALL_SIZES}
import itertools
import os
import time
from types import SimpleNamespace
from vllm import LLM, SamplingParams, envs
from orthorank_vllm.calibrate import startup
from orthorank_vllm.resolve import resolve
from orthorank_vllm.model.fingerprint import Fingerprint
from orthorank_vllm.offline.workers import WorkersTrial
from orthorank_vllm.options import Options
from orthorank_vllm.profiles import model_identity
model_path, cache, options, load_format, sent_path, later_starts = arguments
os.environ |= {{"VLLM_CACHE_ROOT": cache, "VLLM_LOGGING_LEVEL": "INFO"}}
measured = 0
losses_with = WorkersTrial.losses_with
def counted(self, more):
    global measured
    measured += 1
    return losses_with(self, more)
WorkersTrial.losses_with = counted
llm = LLM(
    model_path, dtype="float32", enforce_eager=True, max_model_len=512, load_format=load_format,
    additional_config={{"orthorank": options}},
)
if sent_path:
    from safetensors.torch import load_file
    def send(worker):
        weights = load_file(f"{{sent_path}}/model.safetensors")
        worker.model_runner.reload_weights(weights_iterator=iter(weights.items()))
    llm.collective_rpc(send)
executor = llm.llm_engine.engine_core.engine_core.model_executor
model = executor.driver_worker.worker.get_model()
def log_probs(paused):
    model.orthorank.is_paused = paused
    [output] = llm.generate(
        [{{"prompt_token_ids": list(range(100, 250))}}],
        SamplingParams(max_tokens=1, prompt_logprobs=0),
        use_tqdm=False,
    )
    model.orthorank.is_paused = False
    return [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]
def told():
    global measured
    config, count, measured = model.orthorank.config, measured, 0
    return {{
        "layers": config.layers,
        "ratio": config.ratio,
        "source": config.source,
        "measured": config.measured,
        "measured_on": config.measured_on,
        "trials": count,
        "is_stock": log_probs(False) == log_probs(True),
    }}
def start_again(cache, mishap, seconds_per_look, options):
    os.environ["VLLM_CACHE_ROOT"] = cache
    envs.disable_envs_cache()
    if seconds_per_look:
        clock = itertools.count(0.0, seconds_per_look)
        startup.time = SimpleNamespace(monotonic=lambda: next(clock))
    fingerprint, norm = model.fingerprint, model.model.norm.weight.data
    vllm_config = llm.llm_engine.vllm_config
    model_config = vllm_config.model_config
    model_config.skip_tokenizer_init = mishap == "no tokenizer"
    if mishap == "no fingerprint":
        model.fingerprint = Fingerprint()
    if mishap == "worse than chance":
        model.model.norm.weight.data = -norm
    identity = model_identity(model_config.hf_text_config)
    config = resolve(Options.from_mapping(options), identity, cache)
    if not config.to_choose:
        model.orthorank.use_layers(config)
    vllm_config.additional_config = {{"orthorank": config.as_dict()}}
    startup.choose_layers(executor, vllm_config)
    startup.time, model.fingerprint = time, fingerprint
    model.model.norm.weight.data = norm
    model_config.skip_tokenizer_init = False
    return told()
found = {{"": told()}}
for name, *given in later_starts:
    print("LATER START", name, flush=True)
    found[name] = start_again(*given)
answer(found)
"""


def start(
    model_path: str,
    cache: Path,
    load_format: str = "auto",
    sent_path: str = "",
    later_starts: Any = (),
    **options: Any,
) -> Script:
    """
    Args:
        sent_path: a folder whose weights are sent to the running engine, as trainers do.
        later_starts: name, cache, mishap, seconds that seem to pass whenever the time is looked
            at, and options of each.
    """
    return Script(START, model_path, str(cache), options, load_format, sent_path, later_starts)


class Started:
    """What one engine said at its start, and at later ones: all of it, and its log's lines."""

    def __init__(self, script: Script) -> None:
        self.of: Mapping[str, Any] = script.answer
        first, *later = script.output.split("LATER START ")
        self.log = {"": first}
        for part in later:
            name, _, said = part.partition("\n")
            self.log[name] = said

    def line(self, name: str, part: str) -> str:
        """The one line of a start's log with some words in it."""
        [line] = [line for line in self.log[name].splitlines() if part in line]
        return line


def profiles_in(cache: Path) -> list[Path]:
    return sorted((cache / "orthorank").glob("*.json"))


def profile_in(cache: Path) -> Profile:
    [path] = profiles_in(cache)
    return read_profile(path)


def layers_of(profile: Profile, count: int) -> list[list[float]]:
    """The first of a profile, as they travel."""
    return [[entry.layer, entry.keep] for entry in profile.entries[:count]]


def write_tuned(model_path: str, folder: Path) -> str:
    """A model after a fine-tune: one projection of each layer a little different."""
    model = AutoModelForCausalLM.from_pretrained(model_path)
    torch.manual_seed(4)
    for layer in model.model.layers:
        weight = layer.self_attn.v_proj.weight
        low_rank = torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1])
        weight.data += 0.01 * weight.std() * low_rank
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(folder)
    return str(folder)
