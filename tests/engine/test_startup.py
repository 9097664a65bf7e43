"""Engines that calibrate themselves when they first start."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from orthorank_vllm.profiles import read_profile
from tests.reference import Reference, Rule
from tests.replay import SAFE_MARGIN, TOLERANCE
from tests.scripts import Script

pytestmark = pytest.mark.model

START = """
import time
from vllm import LLM, SamplingParams
from orthorank_vllm.engine import startup
choose_layers = startup.choose_layers
seconds = []
def timed(*args):
    start = time.monotonic()
    choose_layers(*args)
    seconds.append(time.monotonic() - start)
startup.choose_layers = timed
model_path, options, prompt = arguments
llm = LLM(
    model_path, dtype="float32", enforce_eager=True, max_model_len=512,
    additional_config={"orthorank": options},
)
model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.get_model()
config = model.orthorank.config
[output] = llm.generate(
    [{"prompt_token_ids": prompt}],
    SamplingParams(max_tokens=1, prompt_logprobs=0),
    use_tqdm=False,
)
log_probs = [entry[token].logprob for token, entry in zip(prompt[1:], output.prompt_logprobs[1:])]
answer([config.layers, config.source, config.measured, seconds, log_probs])
"""
SHORT_PROMPT = list(range(100, 120))


def start(model_path: str, cache: Path, prompt: list[int] = SHORT_PROMPT, **options: Any) -> Script:
    return Script(
        START, model_path, options, prompt, VLLM_CACHE_ROOT=str(cache), VLLM_LOGGING_LEVEL="INFO"
    )


def profiles_in(cache: Path) -> list[Path]:
    return sorted((cache / "orthorank").glob("*.json"))


def test_the_first_start_measures_and_later_ones_find_what_it_measured(
    small_model_path: str, tmp_path: Path, text_tokens: list[int]
) -> None:
    # Different tokens: equal ones are equal in layer 0, and tie.
    prompt = list(dict.fromkeys(text_tokens))[50:110]
    first = start(small_model_path, tmp_path, prompt, ratio=0.3)
    layers, source, measured, _, log_probs = first.answer
    assert len(layers) == 3
    assert measured
    [path] = profiles_in(tmp_path)
    assert source == f"calibration at start-up, kept in {path}"
    assert "chooses 3 of 6 layers by measurement, in at most 60 s" in first.output
    assert sorted(read_profile(path).order) == layers

    second = start(small_model_path, tmp_path, prompt, ratio=0.3)
    found_layers, source, _, seconds, found_log_probs = second.answer
    assert found_layers == layers
    assert source == "profile SmolLM2-first-6-layers"
    assert seconds == []
    assert found_log_probs == log_probs

    model = AutoModelForCausalLM.from_pretrained(small_model_path, dtype=torch.float32)
    request = Reference(model, Rule(tuple(layers))).start(prompt)
    wanted = request.forward(0, len(prompt))[:-1]
    assert request.margin > SAFE_MARGIN, "a choice that float noise may make: change the prompt"
    wanted = wanted.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert (torch.tensor(log_probs) - wanted).abs().max() < TOLERANCE

    more = start(small_model_path, tmp_path, ratio=0.4)
    more_layers, source, _, _, _ = more.answer
    assert len(more_layers) == 4
    assert set(layers) < set(more_layers)
    assert source.startswith("calibration at start-up")


def test_two_engines_that_start_at_once_agree_on_one_profile(
    small_model_path: str, tmp_path: Path
) -> None:
    both = [start(small_model_path, tmp_path, ratio=0.3) for _ in range(2)]
    answers = [script.answer for script in both]
    assert answers[0][0] == answers[1][0]
    [path] = profiles_in(tmp_path)
    assert sorted(read_profile(path).order) == answers[0][0]
    sources = sorted(answer[1] for answer in answers)
    assert sources[0].startswith("calibration at start-up")
    assert sources[1] == "profile SmolLM2-first-6-layers"


def test_a_calibration_keeps_to_its_time(model_path: str, tmp_path: Path) -> None:
    """All of the real model's layers past the shipped profile's 14."""
    script = start(model_path, tmp_path, ratio=0.4, calibrate_seconds=45)
    layers, source, _, [seconds], _ = script.answer
    assert len(layers) == 18
    assert source.startswith("calibration at start-up")
    assert seconds < 45 * 1.1
    [path] = profiles_in(tmp_path)
    assert len(read_profile(path).order) == 18


def test_without_time_the_layers_are_guessed_and_the_log_says_so(
    small_model_path: str, tmp_path: Path
) -> None:
    script = start(small_model_path, tmp_path, ratio=0.1, calibrate_seconds=0.01)
    layers, source, measured, _, _ = script.answer
    assert (len(layers), source, measured) == (1, "even spacing (not measured)", False)
    assert "OrthoRank could not calibrate in 0 s" in script.output
    assert "Measure one with `orthorank calibrate`" in script.output
    assert profiles_in(tmp_path) == []


def test_a_profile_that_cannot_be_kept_is_used_all_the_same(
    small_model_path: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "orthorank").write_text("in the way")
    script = start(small_model_path, cache, ratio=0.1)
    layers, _, measured, _, _ = script.answer
    assert (len(layers), measured) == (1, True)
    assert "could not keep the profile" in script.output
