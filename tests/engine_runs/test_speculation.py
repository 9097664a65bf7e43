"""N-gram speculation: its verification rows are always selected, and mix with prefill."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.reference import Reference, Rule
from tests.support.replay import SAFE_MARGIN
from tests.support.scripts import Script

pytestmark = pytest.mark.model

LAYERS = [7, 26, 14, 25, 13, 3, 5, 17, 12, 16]
PROMPTS = [list(range(100, 130)) * 5, list(range(300, 341)) * 3, list(range(500, 640))]
TOKENS = 20

SERVE = """
from tests.support.replay import Engine, Job
model, layers, prompts, tokens = arguments
engine = Engine(
    model,
    enforce_eager=True,
    max_model_len=512,
    speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    additional_config={"orthorank": {"layers": layers}},
)
jobs = [
    Job(prompt, max_tokens=tokens, arrives=3 * i, want_prompt_logprobs=False)
    for i, prompt in enumerate(prompts)
]
run = engine.run(jobs)
parts = [part for job in jobs for part in run.chunks(job) if part.num_computed >= len(job.prompt)]
answer([[job.generated for job in jobs], max(p.num_tokens for p in parts)])
"""


def test_n_gram_speculation_gives_the_tokens_of_plain_decoding(model_path: str) -> None:
    script = Script(SERVE, model_path, LAYERS, PROMPTS, TOKENS)
    generated, most_verified = script.answer
    assert most_verified == 4

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    reference = Reference(model, Rule(layers=tuple(LAYERS)))
    for prompt, tokens in zip(PROMPTS, generated, strict=True):
        request = reference.start(prompt)
        wanted = [int(request.forward(0, len(prompt))[-1].argmax())]
        for position in range(len(prompt), len(prompt) + TOKENS - 1):
            request.append(wanted[-1])
            wanted.append(int(request.forward(position, position + 1)[0].argmax()))
        assert request.margin > SAFE_MARGIN, "a choice that float noise may make: change the prompt"
        assert tokens == wanted
