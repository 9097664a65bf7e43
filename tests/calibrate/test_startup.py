"""Engines that calibrate themselves when they first start."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orthorank_vllm.profiles import read_profile
from tests.support.models import fingerprint_of, write_untrained
from tests.support.reference import Reference, Rule
from tests.support.replay import SAFE_MARGIN, TOLERANCE
from tests.support.scripts import Script

pytestmark = pytest.mark.model

START = """
import time
from dataclasses import replace
from vllm import LLM, SamplingParams
from orthorank_vllm.calibrate import startup
choose_layers = startup.choose_layers
seconds = []
def timed(*args):
    start = time.monotonic()
    choose_layers(*args)
    seconds.append(time.monotonic() - start)
startup.choose_layers = timed
model_path, options, prompt, load_format, sent_path = arguments
if load_format == "mapped":
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from orthorank_vllm.engine.models import MeasuredForCausalLM
    @register_model_loader("mapped")
    class Mapped(DefaultModelLoader):
        def __init__(self, load_config):
            super().__init__(replace(load_config, load_format="auto"))
        def load_weights(self, model, model_config):
            stock = super(MeasuredForCausalLM, model)
            stock.load_weights(self.get_all_weights(model_config, model))
llm = LLM(
    model_path, dtype="float32", enforce_eager=True, max_model_len=512, load_format=load_format,
    additional_config={"orthorank": options},
)
if sent_path:
    from safetensors.torch import load_file
    def send(worker):
        weights = load_file(f"{sent_path}/model.safetensors")
        worker.model_runner.reload_weights(weights_iterator=iter(weights.items()))
    llm.collective_rpc(send)
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
OTHERS_PROFILE = "was measured on other weights of this shape"
SHORT_PROMPT = list(range(100, 120))


def start(
    model_path: str,
    cache: Path,
    prompt: list[int] = SHORT_PROMPT,
    load_format: str = "auto",
    sent_path: str = "",
    **options: Any,
) -> Script:
    """
    Args:
        load_format: "mapped" is one whose weights do not pass the model's own loading.
        sent_path: a folder whose weights are sent to the running engine, as trainers do.
    """
    given = model_path, options, prompt, load_format, sent_path
    return Script(START, *given, VLLM_CACHE_ROOT=str(cache), VLLM_LOGGING_LEVEL="INFO")


@pytest.fixture(scope="module")
def tuned_path(small_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small model after a fine-tune: one projection of each layer a little different."""
    folder = tmp_path_factory.mktemp("models") / "tuned"
    model = AutoModelForCausalLM.from_pretrained(small_model_path)
    torch.manual_seed(4)
    for layer in model.model.layers:
        weight = layer.self_attn.v_proj.weight
        low_rank = torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1])
        weight.data += 0.01 * weight.std() * low_rank
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(small_model_path).save_pretrained(folder)
    return str(folder)


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
    assert read_profile(path).weights == fingerprint_of(small_model_path)

    second = start(small_model_path, tmp_path, prompt, ratio=0.3)
    found_layers, source, _, _, found_log_probs = second.answer
    assert found_layers == layers
    assert source == "profile SmolLM2-first-6-layers"
    assert "by measurement" not in second.output
    assert OTHERS_PROFILE not in second.output
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
    source_told = "even spacing, not measured: 0.01 s were too few"
    assert (len(layers), source, measured) == (1, source_told, False)
    [line] = [line for line in script.output.splitlines() if "guessed its layers" in line]
    assert source_told in line
    assert "give --orthorank-calibrate-seconds" in line
    assert "`orthorank calibrate`" in line
    assert profiles_in(tmp_path) == []


def test_too_many_layers_for_a_guess_after_too_little_time_name_the_time(
    small_model_path: str, tmp_path: Path
) -> None:
    """Break seen: only --orthorank-layers was named, and that a profile was missing."""
    script = start(small_model_path, tmp_path, ratio=0.3, calibrate_seconds=0.01)
    assert script.exit_status != 0
    [line, *_] = [line for line in script.output.splitlines() if "OptionError" in line]
    assert "it needs 3 selective layers" in line
    assert "0.01 s were too few" in line
    assert "give --orthorank-calibrate-seconds" in line
    assert "--orthorank-layers" in line


def test_random_weights_are_neither_measured_nor_kept_not_even_once_real_ones_are_sent(
    small_model_path: str, tmp_path: Path
) -> None:
    """Break seen: the next start took what a dummy start had kept."""
    dummy: Any = {"load_format": "dummy", "ratio": 0.1}
    script = start(small_model_path, tmp_path, sent_path=small_model_path, **dummy)
    layers, source, measured, seconds, _ = script.answer
    source_told = "even spacing, not measured: this load format loads no weights"
    assert (len(layers), source, measured, seconds) == (1, source_told, False, [])
    [line] = [line for line in script.output.splitlines() if "guessed its layers" in line]
    assert "--orthorank-profile" in line
    assert profiles_in(tmp_path) == []

    real = start(small_model_path, tmp_path, ratio=0.1)
    _, source, measured, _, _ = real.answer
    assert measured
    assert source == f"calibration at start-up, kept in {profiles_in(tmp_path)[0]}"
    again = start(small_model_path, tmp_path, **dummy)
    assert again.answer[1] == source_told
    assert len(profiles_in(tmp_path)) == 1


def test_random_weights_run_the_shipped_layers_and_say_so(model_path: str, tmp_path: Path) -> None:
    script = start(model_path, tmp_path, load_format="dummy", ratio=0.1)
    assert script.answer[0] == [3, 4, 5, 6, 7]
    [line] = [line for line in script.output.splitlines() if "loads no weights" in line]
    assert "measures nothing and keeps nothing with --load-format dummy" in line
    assert "its layers are those of profile SmolLM2-135M-Instruct" in line
    assert profiles_in(tmp_path) == []


def test_the_shipped_profile_was_measured_on_these_weights(model_path: str, tmp_path: Path) -> None:
    script = start(model_path, tmp_path, ratio=0.1)
    assert script.answer[1] == "profile SmolLM2-135M-Instruct"
    assert OTHERS_PROFILE not in script.output


def test_a_fine_tune_does_not_take_what_its_base_has_measured(
    small_model_path: str, tuned_path: str, tmp_path: Path
) -> None:
    """Break seen: known by the configuration alone, it took the base's."""
    base = start(small_model_path, tmp_path, ratio=0.1)
    assert base.answer[1].startswith("calibration at start-up, kept in")
    [of_base] = profiles_in(tmp_path)
    tuned = start(tuned_path, tmp_path, ratio=0.1)
    source = tuned.answer[1]
    [of_tuned] = set(profiles_in(tmp_path)) - {of_base}
    assert source == f"calibration at start-up, kept in {of_tuned}"
    [line] = [line for line in tuned.output.splitlines() if "by measurement" in line]
    assert "no profile of these weights" in line
    again = start(small_model_path, tmp_path, ratio=0.1)
    assert again.answer[1] == "profile SmolLM2-first-6-layers"

    by_hand = start(tuned_path, tmp_path, ratio=0.1, profile=str(of_base))
    assert by_hand.answer[1] == "profile SmolLM2-first-6-layers"
    assert by_hand.answer[0] == base.answer[0]
    assert by_hand.output.count(OTHERS_PROFILE) == 1


def test_a_model_no_better_than_chance_is_not_measured(
    small_model_path: str, tmp_path: Path
) -> None:
    script = start(write_untrained(small_model_path, tmp_path / "model"), tmp_path, ratio=0.1)
    _, source, measured, _, _ = script.answer
    assert not measured
    assert source.startswith("even spacing, not measured: the dense model's loss, ")
    assert source.endswith("nats a token, is no better than chance, 10.8")
    assert profiles_in(tmp_path) == []


def test_weights_without_a_fingerprint_are_measured_and_not_kept(
    small_model_path: str, tmp_path: Path
) -> None:
    script = start(small_model_path, tmp_path, load_format="mapped", ratio=0.1)
    _, source, measured, _, _ = script.answer
    assert (source, measured) == ("calibration at start-up, not kept", True)
    assert "does not keep what it measured" in script.output
    assert profiles_in(tmp_path) == []


def test_a_profile_that_cannot_be_kept_is_used_all_the_same(
    small_model_path: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "orthorank").write_text("in the way")
    script = start(small_model_path, cache, ratio=0.1)
    layers, source, measured, _, _ = script.answer
    assert (len(layers), source, measured) == (1, "calibration at start-up, not kept", True)
    assert "could not keep the profile" in script.output
