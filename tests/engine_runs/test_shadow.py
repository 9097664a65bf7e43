"""Prompts that are computed once more, densely: what is told of them, and what does not change.

On a small model with layers by hand, in the real engine; `SHADOWED` runs once for most tests here.
"""

import math
from pathlib import Path
from typing import Any

import pytest

from orthorank_vllm.engine.shadow_runs import STEP_TOKENS, STEP_TOKENS_BESIDE
from tests.support.models import write_random
from tests.support.replay import TOLERANCE
from tests.support.scripts import Script

pytestmark = pytest.mark.model

RULE = {
    "window": 64,
    "tail": 16,
    "layers": "4:0,1:1/3,3:1/4,2:0",
    "ratio": 0.27,
    "max_ratio": 0.56,
    "shadow": 1.0,
}

COMMON = """
import random
from unittest import mock
from vllm import SamplingParams
from orthorank_vllm.engine import shadow_rows, shadow_runs
from orthorank_vllm.metrics.collector import orthorank_metrics
from tests.support.replay import Engine, Job
path, rule, options = arguments
engine = Engine(
    path, enforce_eager=True, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=4,
    block_size=32, num_gpu_blocks_override=20, max_logprobs=512,
    additional_config={"orthorank": rule}, **options,
)
scheduler = engine.scheduler
draw = random.Random(0)
def words(length):
    return [draw.randrange(5, 500) for _ in range(length)]

def told(name, **labels):
    return sum(
        sample.value for metric in orthorank_metrics() for sample in metric.samples
        if sample.name == "orthorank_shadow_" + name and labels.items() <= sample.labels.items()
    )

def drain():
    # As the engine's own process does when no client wants anything.
    steps = 0
    while scheduler.has_requests():
        assert engine.llm.llm_engine.engine_core.get_output().outputs == []
        steps += 1
        assert steps < 100
    return len(scheduler.requests), len(scheduler.running), scheduler.kv_cache_manager.usage

def whole(prompt, ratio):
    params = SamplingParams(
        temperature=0, max_tokens=2, logprobs=512, ignore_eos=True, detokenize=False,
        extra_args=None if ratio is None else {"orthorank_ratio": ratio},
    )
    # Not by `generate`, which leaves no place to look in between.
    core = engine.llm.llm_engine
    core.add_request(f"whole {draw.random()}", {"prompt_token_ids": prompt}, params)
    while core.has_unfinished_requests():
        for output in core.step():
            first = output.outputs[0].logprobs[0]
    return [first[token].logprob for token in range(512)]

def crowd():
    # The same, whatever was drawn before.
    draw.seed(1)
    beginning = words(100)
    prompts = [words(draw.randrange(20, 300)) for _ in range(20)]
    prompts += [beginning + words(draw.randrange(5, 200)) for _ in range(10)]
    jobs = [
        Job(prompt, draw.randrange(1, 12), want_prompt_logprobs=False,
            ratio=draw.choice([None, None, 0.5, 0.0]), arrives=3 * place)
        for place, prompt in enumerate(prompts)
    ]
    engine.run(jobs, budget=lambda step: (100, 64, 150)[step % 3])
    answers = []
    for job in jobs:
        told = zip(job.generated, job.output.outputs[0].logprobs)
        answers.append([job.generated, [entry[token].logprob for token, entry in told]])
    return answers
"""

SHADOWED = (
    COMMON
    + """
result = {"pairs": []}
# One after the other, with what the first left in the prefix cache.
first = words(250)
for prompt, ratio in (
    (first, None), (first[:200] + words(90), None), (words(300), 0.5), (words(18), 0.1),
    (first, 0.4),
):
    before = told("kl_sum"), told("comparisons_total"), told("top1_agreements_total")
    ours = whole(prompt, ratio)
    left = drain()
    after = told("kl_sum"), told("comparisons_total"), told("top1_agreements_total")
    result["pairs"].append(
        [ours, whole(prompt, 0.0), [b - a for a, b in zip(before, after)], left]
    )
    # A dense request is none to compare.
    assert drain() == (0, 0, 0.0)
    assert told("comparisons_total") == after[1]
result["tokens"] = told("prefill_tokens_total")
before = told("comparisons_total")
whole(words(17), None)
drain()
result["tails"] = told("comparisons_total") - before

# In a crowd: when a step has a part of a re-run.
# Without regard for the time.
shadow_runs.RETRY_SECONDS = 0.0
steps = []
inner = scheduler.schedule
def seen(*args, **kwargs):
    waiting = scheduler.get_request_counts()[1]
    others = [each for each in scheduler.running if "shadow" not in each.request_id]
    in_prompt = sum(each.num_computed_tokens < each.num_prompt_tokens for each in others)
    output = inner(*args, **kwargs)
    reruns = [name for name in output.num_scheduled_tokens if "shadow" in name]
    tokens = sum(output.num_scheduled_tokens[name] for name in reruns)
    steps.append([waiting, in_prompt, len(others), tokens, len(reruns)])
    return output
scheduler.schedule = seen
before = told("comparisons_total"), told("dropped_total")
result["crowd"] = crowd()
result["left"] = drain()
result["compared"] = told("comparisons_total") - before[0]
result["dropped"] = told("dropped_total") - before[1]
result["steps"] = steps

# Requests that are aborted, amid the prompt and after it.
core = engine.llm.llm_engine
aborted = []
for steps_before in (1, 4):
    before = told("comparisons_total")
    scheduler.max_num_scheduled_tokens = 64
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, detokenize=False)
    core.add_request(f"gone {steps_before}", {"prompt_token_ids": words(170)}, params)
    for _ in range(steps_before):
        core.step()
    core.abort_request([f"gone {steps_before}"])
    scheduler.max_num_scheduled_tokens = engine.default_budget
    aborted.append([drain(), told("comparisons_total") - before])
result["aborted"] = aborted

# A cache that is emptied while a re-run holds blocks.
scheduler.max_num_scheduled_tokens = 64
whole(words(150), None)
while not scheduler.kv_cache_manager.usage:
    core.engine_core.get_output()
held = scheduler.kv_cache_manager.usage
result["reset"] = [held, engine.llm.reset_prefix_cache(), scheduler.kv_cache_manager.usage]
scheduler.max_num_scheduled_tokens = engine.default_budget
drain()

# Errors: of a comparison, and of the scheduling, after which none is tried any more.
failures = []
def difference(these, those):
    return max(abs(this - that) for this, that in zip(these, those))
for where, what in ((shadow_rows, "compare"), (shadow_runs, "_rerun_of")):
    before = told("dropped_total", reason="failed")
    with mock.patch.object(where, what, side_effect=RuntimeError("a test's")):
        answer_before = whole(first, None)
        drain()
    count = told("dropped_total", reason="failed") - before
    failures.append([count, difference(whole(first, None), answer_before)])
    drain()
result["failures"] = failures
before = told("comparisons_total")
whole(words(100), None)
drain()
result["after"] = told("comparisons_total") - before
answer(result)
"""
)

RANKS = (
    COMMON
    + """
prompt = words(120)
ours = whole(prompt, None)
left = drain()
answer([ours, whole(prompt, 0.0), told("kl_sum"), told("comparisons_total"), left])
"""
)
PLAIN = COMMON + "answer([crowd(), drain(), told('comparisons_total')])"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("model")
    return write_random("Llama", path)


@pytest.fixture(scope="module")
def shadowed(folder: str) -> Any:
    return Script(SHADOWED, folder, RULE, {}).answer


@pytest.fixture(scope="module")
def plain(folder: str) -> Any:
    return Script(PLAIN, folder, {**RULE, "shadow": 0}, {}).answer


def divergence(ours: list[float], dense: list[float]) -> float:
    """KL(dense || OrthoRank), of log-probabilities."""
    return sum(math.exp(q) * (q - p) for p, q in zip(ours, dense, strict=True))


def test_the_divergence_is_that_of_the_two_requests_whoever_asks_for_them(shadowed: Any) -> None:
    """From the prefix cache and at other ratios too; each prompt once."""
    for ours, dense, (kl, compared, agreed), _ in shadowed["pairs"]:
        assert kl == pytest.approx(divergence(ours, dense), abs=1e-4)
        assert compared == 1
        assert agreed == (ours.index(max(ours)) == dense.index(max(dense)))
    assert max(kl for _, _, (kl, *_), _ in shadowed["pairs"]) > 100 * 1e-4, "layers too dull"
    assert shadowed["tokens"] == 250 + 290 + 300 + 18 + 250


def test_a_prompt_of_which_nothing_may_be_skipped_is_not_compared(shadowed: Any) -> None:
    assert shadowed["tails"] == 0


def test_the_engine_is_idle_afterwards_and_holds_no_block(shadowed: Any) -> None:
    for *_, left in shadowed["pairs"]:
        assert left == [0, 0, 0.0]
    assert shadowed["left"] == [0, 0, 0.0]


def test_answers_are_those_of_an_engine_without_it(shadowed: Any, plain: Any) -> None:
    """In a crowd that fills the cache, so that re-runs are ended."""
    answers, left, compared = plain
    assert compared == 0
    assert left == [0, 0, 0.0]
    assert len(answers) == 30
    for (text, ours), (other_text, theirs) in zip(shadowed["crowd"], answers, strict=True):
        assert text == other_text
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < TOLERANCE


def test_nothing_is_run_while_a_request_waits_or_is_in_its_prompt(shadowed: Any) -> None:
    steps = shadowed["steps"]
    assert any(waiting or in_prompt for waiting, in_prompt, *_ in steps)
    for waiting, in_prompt, others, tokens, reruns in steps:
        assert not (tokens and (waiting or in_prompt))
        assert tokens <= (STEP_TOKENS_BESIDE if others else STEP_TOKENS)
        assert reruns <= 1
    beside = [tokens for _, _, others, tokens, _ in steps if tokens and others]
    assert beside, "no step had a re-run beside an answer"


def test_every_prompt_that_was_drawn_is_compared_or_counted_as_dropped(shadowed: Any) -> None:
    assert shadowed["compared"] > 5
    # 30 prompts of at least 20 tokens; those that asked for a ratio of 0 are not drawn.
    assert 15 < shadowed["compared"] + shadowed["dropped"] < 30


def test_a_request_that_is_aborted_breaks_nothing(shadowed: Any) -> None:
    """Amid its prompt there is nothing to compare; after it there is."""
    (amid, compared_amid), (after, compared_after) = shadowed["aborted"]
    assert amid == after == [0, 0, 0.0]
    assert (compared_amid, compared_after) == (0, 1)


def test_a_rerun_is_in_no_ones_way_when_the_cache_is_emptied(shadowed: Any) -> None:
    held, is_emptied, used = shadowed["reset"]
    assert held > 0
    assert is_emptied
    assert used == 0


def test_an_error_in_it_is_counted_and_answers_go_on(shadowed: Any) -> None:
    """Of a comparison it is that one's; in the scheduling none is tried any more."""
    for count, difference in shadowed["failures"]:
        assert count == 1
        assert difference < TOLERANCE
    assert shadowed["after"] == 0


def test_two_ranks_compare_together_and_count_once(folder: str) -> None:
    options = {"tensor_parallel_size": 2}
    ours, dense, kl, compared, left = Script(
        *(RANKS, folder, RULE, options), OMP_NUM_THREADS="1"
    ).answer
    assert kl == pytest.approx(divergence(ours, dense), abs=1e-4)
    assert kl > 1e-3
    assert compared == 1
    assert left == [0, 0, 0.0]
