"""The served model against the independent reference, under real schedules, on real weights.

`test_rules.py` has more rules and schedules, on a model that costs next to nothing.
"""

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import Prompts
from tests.support.reference import Reference, Rule
from tests.support.replay import Engine, Job, check, counted

pytestmark = pytest.mark.model

THIRD = 1 / 3
# Runs of layers that keep nothing, the last one among them, and others that keep their own share.
RULE = Rule(
    {29: 0.0, 20: 0.0, 21: 0.0, 12: 0.25, 7: 0.5, 26: THIRD, 14: THIRD, 3: THIRD, 25: 0.0},
    window=128,
    tail=16,
)
BLOCK_SIZE, NUM_BLOCKS = 32, 64


@pytest.fixture(scope="module")
def engine(model_path: str) -> Iterator[Engine]:
    engine = Engine(
        model_path,
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=16,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=NUM_BLOCKS,
        additional_config={"orthorank": RULE.options},
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(model_path: str) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    return Reference(model, RULE)


@pytest.fixture(autouse=True)
def _empty_prefix_cache(engine: Engine) -> None:
    engine.llm.reset_prefix_cache()


def test_prompts_of_different_lengths_in_one_step_equal_the_reference(
    engine: Engine, reference: Reference, prompts: Prompts
) -> None:
    """Break seen: every request scored against the first request's sink."""
    jobs = [Job(prompts.take(length), max_tokens=2) for length in (300, 7, 128, 129, 64)]
    run = engine.run(jobs)
    assert len(run.forwards[0]) == len(jobs)
    check(run, reference)


def test_chunks_beside_decodes_equal_the_reference_and_are_counted_so(
    engine: Engine, reference: Reference, prompts: Prompts
) -> None:
    """Guards against: decode rows left out of the selection; windows counted from the chunk's
    start; the tail taken of the chunk."""
    names = ("prefill_tokens", "token_updates", "token_updates_skipped")
    before = [counted(name) for name in names]
    jobs = [
        Job(prompts.take(60), max_tokens=12, want_prompt_logprobs=False),
        Job(prompts.take(200), max_tokens=6, arrives=2),
        Job(prompts.take(5), max_tokens=4, arrives=2),
        Job(prompts.take(290), max_tokens=3, arrives=4, want_prompt_logprobs=False),
    ]
    run = engine.run(jobs, budget=lambda step: 97)
    assert any(len({part.num_tokens for part in forward}) > 1 for forward in run.forwards)
    requests = check(run, reference).requests.values()
    tokens, updates, skipped = (
        counted(name) - earlier for name, earlier in zip(names, before, strict=True)
    )
    assert tokens == sum(len(job.prompt) for job in jobs)
    assert updates == sum(request.updates for request in requests)
    assert skipped == sum(request.skipped for request in requests)


def test_a_prefix_cache_hit_with_its_sink_forgotten_equals_the_reference(
    engine: Engine, reference: Reference, prompts: Prompts
) -> None:
    """Guards against: a missing sink's state left at zero instead of recomputed."""
    prefix = prompts.take(6 * BLOCK_SIZE)
    before = check(engine.run([Job(prefix + prompts.take(37))]), reference)
    engine.forget_sinks()
    second = Job(prefix + prompts.take(150), max_tokens=2, want_prompt_logprobs=False)
    run = engine.run([second])
    assert run.chunks(second)[0].num_computed == len(prefix)
    check(run, reference, earlier=list(before.requests.values()))
