"""The rows that vLLM reads are computed in every layer, n-gram speculation's rows among them.

Where one token of a prompt is left, vLLM's scheduler pads the request with placeholders for guesses
at once, and then reads the prompt's last row although it is not the request's last.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.support.models import write_random
from tests.support.reference import Reference, Rule
from tests.support.replay import (
    SAFE_MARGIN,
    TOLERANCE,
    Engine,
    Job,
    answer,
    check,
    is_resumed,
    replay,
)
from tests.support.words import Words

pytestmark = pytest.mark.model

# Of six layers, the last of them dense: it computes rows that are read, and no other. The cache may
# leave one token of a prompt only where that is its tail.
RULE = Rule({1: 1 / 3, 3: 0.0}, window=16, tail=1)
# 512 tokens of KV cache: enough for each test, few enough to force preemption.
BLOCK_SIZE, NUM_BLOCKS = 32, 16
CACHED = 2 * BLOCK_SIZE
GUESSES = 3
LEFT = range(1, 6)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("model")
    return write_random("Llama", folder)


@pytest.fixture(scope="module")
def engine(model_folder: str) -> Iterator[Engine]:
    engine = Engine(
        model_folder,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=8,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=NUM_BLOCKS,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": GUESSES,
            "prompt_lookup_max": 3,
        },
        additional_config={"orthorank": RULE.options},
    )
    yield engine
    engine.close()
    # Speculation imported it. vLLM looks through all modules when the process's next engine starts,
    # and what this one holds says that it has a `__dict__` which is none.
    sys.modules.pop("llvmlite.binding.ffi", None)


@pytest.fixture(scope="module")
def reference(model_folder: str) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    return Reference(model, RULE)


@pytest.fixture(autouse=True)
def _empty_prefix_cache(engine: Engine) -> None:
    engine.llm.reset_prefix_cache()


@pytest.fixture(autouse=True)
def sparse_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[set[int]]]:
    """Of each sparse step the rows that vLLM reads; after the test, that they were computed."""
    runner, orthorank = engine.runner, engine.model.orthorank
    prepare, forward = runner._prepare_inputs, orthorank.forward
    read: set[int] = set()
    steps: list[set[int]] = []
    missing: list[set[int]] = []

    def prepared(*args: Any, **kwargs: Any) -> Any:
        nonlocal read
        prepared = prepare(*args, **kwargs)
        read = set(prepared[0].tolist())
        return prepared

    def sparse(plan: Any, *args: Any) -> Any:
        steps.append(read)
        if plan.sampled_rows is not None:
            missing.append(read - set(plan.sampled_rows.tolist()))
        return forward(plan, *args)

    monkeypatch.setattr(runner, "_prepare_inputs", prepared)
    monkeypatch.setattr(orthorank, "forward", sparse)
    yield steps
    assert not any(missing)


@pytest.mark.parametrize("requests", [1, 4])
@pytest.mark.parametrize("left", LEFT)
def test_requests_with_a_few_prompt_tokens_left_by_the_cache_equal_the_reference(
    engine: Engine, reference: Reference, sparse_steps: list[set[int]], left: int, requests: int
) -> None:
    """Break seen: a row before the guesses not read where it is of the prompt."""
    words = Words(10 * left + requests)
    prefix = words.take(CACHED)
    before = check(engine.run([answer(prefix + words.take(7))]), reference)
    sparse_steps.clear()
    few = [answer(prefix + words.take(left)) for _ in range(requests)]
    run = engine.run([*few, answer(words.take(70))])
    for job in few:
        assert run.chunks(job)[0].num_computed == CACHED
        assert run.chunks(job)[0].num_tokens == (1 + GUESSES if left == 1 else left)
    assert len(sparse_steps[0]) == (requests * (1 + GUESSES) + 1 if left == 1 else requests + 1)
    check(run, reference, earlier=list(before.requests.values()))


@pytest.mark.parametrize("requests", [1, 4])
@pytest.mark.parametrize("left", LEFT)
def test_requests_with_a_few_prompt_tokens_left_by_a_chunk_equal_the_reference(
    engine: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch, left: int, requests: int
) -> None:
    """All of them beside a prompt that arrives then.

    Break seen: a prompt's last row not read.
    """
    words = Words(10 * left + requests)
    chunk = 50
    # Alone a request takes what there is; beside others not more than this.
    settings = engine.scheduler.scheduler_config
    monkeypatch.setattr(settings, "long_prefill_token_threshold", chunk)
    few = [answer(words.take(chunk + left)) for _ in range(requests)]
    run = engine.run(
        [*few, answer(words.take(45), arrives=1)],
        budget=lambda step: 500 if step else requests * chunk,
    )
    for job in few:
        first, second = run.chunks(job)[:2]
        assert (first.num_tokens, second.num_tokens) == (chunk, left)
    assert len(run.forwards[1]) == requests + 1
    check(run, reference)


@pytest.mark.parametrize("tokens", [1, 2, 6])
def test_a_prompt_of_one_token_between_decoding_and_a_prompt_equals_the_reference(
    engine: Engine, reference: Reference, tokens: int
) -> None:
    """Break seen: the same; the answer may end with the very row that was padded."""
    words = Words(tokens)
    one = answer(words.take(1), tokens, arrives=3)
    run = engine.run([answer(words.take(40), 9), one, answer(words.take(90), arrives=3)])
    assert run.chunks(one)[0].num_tokens == 1 + GUESSES
    assert len(run.forwards[3]) == 3
    check(run, reference)


def test_n_gram_speculation_gives_the_tokens_of_plain_decoding(
    engine: Engine, reference: Reference
) -> None:
    """Prompts that repeat themselves, so that there is something to guess, and to guess wrong.

    Guards against: a verified row left out where it is not the request's last.
    """
    words = Words(4)
    jobs = [
        answer(prompt, tokens=24, arrives=3 * index)
        for index, prompt in enumerate([words.take(20) * 4, words.take(30) * 2, words.take(90)])
    ]
    run = engine.run(jobs)
    parts = [part for job in jobs for part in run.chunks(job)]
    verified = [part for part in parts if part.num_computed >= 60 and part.num_tokens > 1]
    assert max(part.num_tokens for part in verified) == 1 + GUESSES
    check(run, reference)
    for job in jobs:
        request = reference.start(job.prompt)
        wanted = [int(request.forward(0, len(job.prompt))[-1].argmax())]
        for position in range(len(job.prompt), len(job.prompt) + 23):
            request.append(wanted[-1])
            wanted.append(int(request.forward(position, position + 1)[0].argmax()))
        assert request.margin > SAFE_MARGIN, "a choice that float noise may make: change the seed"
        assert job.generated == wanted


def test_a_request_resumed_with_guesses_after_a_preemption_equals_the_reference(
    engine: Engine, reference: Reference
) -> None:
    """Break seen: a prompt's last row not read."""
    words = Words(1)
    jobs = [answer(words.take(100), tokens=70) for _ in range(4)]
    run = engine.run(jobs)
    assert any(is_resumed(run, job) for job in jobs), "the KV cache was large enough"
    verified = [part for job in jobs for part in run.chunks(job) if part.num_computed > 100]
    assert any(1 < part.num_tokens <= 1 + GUESSES for part in verified)
    check(run, reference)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=[Phase.generate],
    print_blob=True,
)
@given(data=st.data())
def test_any_prompts_any_cached_prefix_and_any_schedule_equal_the_reference(
    engine: Engine, reference: Reference, data: st.DataObject
) -> None:
    """Break seen: the same."""
    engine.llm.reset_prefix_cache()
    words = Words(data.draw(st.integers(0, 10**6), label="seed"))
    prefix = words.take(CACHED)
    before = replay(engine.run([answer(prefix + words.take(7))]), reference)
    jobs = []
    for _ in range(data.draw(st.integers(1, 4), label="requests")):
        cached = data.draw(st.sampled_from([0, 0, BLOCK_SIZE, CACHED]), label="cached")
        own = data.draw(st.sampled_from([1, 1, 2, 3, 4, 5, 30, 60]), label="own")
        jobs.append(
            Job(
                prefix[:cached] + words.take(own),
                max_tokens=data.draw(st.integers(1, 12), label="max_tokens"),
                arrives=data.draw(st.integers(0, 3), label="arrives"),
                want_prompt_logprobs=data.draw(
                    st.sampled_from([False, False, True]), label="prompt log-probabilities"
                ),
            )
        )
    budgets = data.draw(st.lists(st.integers(5, 80), min_size=1, max_size=4), label="budgets")
    run = engine.run(jobs, budget=lambda step: budgets[step % len(budgets)])
    verdict = replay(run, reference, earlier=list(before.requests.values()))
    assert verdict.compared >= len(jobs)
    assume(verdict.worst < TOLERANCE or verdict.margin > SAFE_MARGIN)
    assert verdict.worst < TOLERANCE
