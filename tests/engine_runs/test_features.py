"""Features of vLLM that work beside OrthoRank; those that cannot are in test_configure.py."""

from typing import Any

import pytest

from tests.conftest import Prompts
from tests.support.replay import SAFE_MARGIN, TOLERANCE
from tests.support.scripts import Script

pytestmark = pytest.mark.model

SERVE = """
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from tests.support.reference import Reference, Rule
from tests.support.replay import Engine, Job, replay
path, other_path, rule, prompts, choices = arguments
engine = Engine(
    path, enforce_eager=True, max_model_len=1024,
    additional_config={"orthorank": rule},
)
only = SamplingParams(
    temperature=0, max_tokens=20, structured_outputs=StructuredOutputsParams(choice=choices)
)
chosen = engine.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], only)

engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": other_path})
engine.llm.reset_prefix_cache()
sinks_left = len(engine.model.orthorank._sinks)
run = engine.run([Job(prompt) for prompt in prompts], budget=lambda step: 140)
other = AutoModelForCausalLM.from_pretrained(other_path, dtype=torch.float32)
verdict = replay(run, Reference(other, Rule.of(rule)))
answer({
    "chosen": [output.outputs[0].text for output in chosen],
    "sinks_left": sinks_left,
    "worst": verdict.worst,
    "margin": verdict.margin,
    "skipped": sum(request.skipped for request in verdict.requests.values()),
})
"""
CHOICES = ["orthogonal", "aligned"]
RULE = {"layers": [[1, 0.25], [3, 0], [4, 1 / 3]], "window": 128, "tail": 16}


@pytest.fixture(scope="module")
def answer(
    small_model_path: str, text_tokens: list[int], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    other = tmp_path_factory.mktemp("models") / "other"
    model = AutoModelForCausalLM.from_pretrained(small_model_path, dtype=torch.float32)
    torch.manual_seed(2)
    # Not the embeddings: on CPU stock vLLM does not renew the output layer that shares them.
    for weight in model.model.layers.parameters():
        weight.data *= torch.empty_like(weight).uniform_(0.9, 1.1)
    model.save_pretrained(other)
    prompts = Prompts(text_tokens, seed=8)
    taken = [prompts.take(length) for length in (300, 150)]
    return Script(SERVE, small_model_path, str(other), RULE, taken, CHOICES).answer


def test_structured_output_keeps_to_its_choices(answer: dict[str, Any]) -> None:
    assert set(answer["chosen"]) <= set(CHOICES)


def test_weights_that_are_reloaded_are_the_ones_that_serve(answer: dict[str, Any]) -> None:
    assert answer["margin"] > SAFE_MARGIN, "float noise chose: take other prompts"
    assert answer["skipped"] > 0
    assert answer["worst"] < TOLERANCE


def test_no_sink_outlives_the_weights(answer: dict[str, Any]) -> None:
    """Break seen: the table not cleared."""
    assert answer["sinks_left"] == 0
