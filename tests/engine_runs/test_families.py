"""Families beside Llama, served by the real engine and compared with the reference."""

import random
from typing import Any

import pytest

from tests.conftest import Prompts
from tests.support.models import FAMILIES, write_as_mistral, write_as_mixtral, write_random
from tests.support.replay import SAFE_MARGIN, TOLERANCE
from tests.support.scripts import Script

pytestmark = pytest.mark.model

# Serves each model in turn: several prompts in chunks, then one that finds the first one in the
# prefix cache.
SERVE = """
import torch
from transformers import AutoModelForCausalLM
from tests.support.reference import Reference, Rule
from tests.support.replay import Engine, Job, replay
from vllm.distributed import cleanup_dist_env_and_memory
cases, budget = arguments
verdicts = {}
for name, (path, reference_path, rule, prompts) in cases.items():
    engine = Engine(
        path, enforce_eager=True, max_model_len=1024, block_size=32, skip_tokenizer_init=True,
        num_gpu_blocks_override=256, additional_config={"orthorank": rule},
    )
    model = AutoModelForCausalLM.from_pretrained(reference_path, dtype=torch.float32)
    # Its own config has it; a stand-in's has not.
    model.config.sliding_window = getattr(
        engine.llm.llm_engine.model_config.hf_config, "sliding_window", None
    )
    reference = Reference(model, Rule.of(rule))
    run = engine.run(
        [Job(prompt, max_tokens=3) for prompt in prompts], budget=lambda step: budget
    )
    verdict = replay(run, reference)
    cached = Job(prompts[0] + prompts[1][:50], max_tokens=2, want_prompt_logprobs=False)
    later = engine.run([cached])
    again = replay(later, reference, earlier=list(verdict.requests.values()))
    requests = [*verdict.requests.values(), *again.requests.values()]
    verdicts[name] = {
        "class": type(engine.model).__name__,
        "worst": [verdict.worst, again.worst],
        "compared": verdict.compared + again.compared,
        "margin": min(verdict.margin, again.margin),
        "cached": later.chunks(cached)[0].num_computed,
        "skipped": sum(request.skipped for request in requests),
    }
    del engine
    cleanup_dist_env_and_memory()
answer(verdicts)
"""
LENGTHS = (150, 333, 64, 7)
BUDGET = 200


def check(
    verdict: dict[str, Any], lengths: tuple[int, ...] = LENGTHS, cached: int = LENGTHS[0] // 32 * 32
) -> None:
    assert verdict["margin"] > SAFE_MARGIN, "float noise chose: take other prompts"
    assert max(verdict["worst"]) < TOLERANCE
    assert verdict["compared"] > sum(lengths)
    assert verdict["skipped"] > 0
    assert verdict["cached"] == cached


@pytest.fixture(scope="module")
def random_verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("families")
    draw = random.Random(3)
    prompts = [[draw.randrange(3, 500) for _ in range(length)] for length in LENGTHS]
    rule = {"layers": [[1, 1 / 3], [3, 0], [4, 1 / 4]], "window": 32, "tail": 5}
    paths = {name: write_random(name, folder / name) for name in FAMILIES}
    cases = {name: (path, path, rule, prompts) for name, path in paths.items()}
    verdicts: dict[str, dict[str, Any]] = Script(SERVE, cases, BUDGET).answer
    return verdicts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_of_each_family_equals_the_reference(
    random_verdicts: dict[str, dict[str, Any]], family: str
) -> None:
    check(random_verdicts[family])
    assert random_verdicts[family]["class"] == f"OrthoRank{family}ForCausalLM"


def test_real_weights_as_mistral_and_as_mixtral_equal_what_they_are_in_llama(
    small_model_path: str, prompts: Prompts, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Past the sliding window, in chunks and from the prefix cache."""
    folder = tmp_path_factory.mktemp("real")
    lengths = (600, 400, 90)
    taken = [prompts.take(length) for length in lengths]
    rule = {"layers": [[1, 1 / 3], [3, 0], [4, 1 / 4]], "window": 128, "tail": 16}
    paths = {
        "Mistral": write_as_mistral(small_model_path, folder / "mistral", sliding_window=256),
        "Mixtral": write_as_mixtral(small_model_path, folder / "mixtral", experts=4),
    }
    cases = {name: (path, small_model_path, rule, taken) for name, path in paths.items()}
    verdicts = Script(SERVE, cases, BUDGET).answer
    for family, verdict in verdicts.items():
        # Whole windows before the tail; of a sliding window's blocks, some are gone by then.
        check(verdict, lengths, cached=0 if family == "Mistral" else (600 - 16) // 128 * 128)
        assert verdict["class"] == f"OrthoRank{family}ForCausalLM"
