"""Requests of different ratios in one batch, each as on a server of its ratio.

On a small model with layers by hand, in the real engine: see `CODE`. They begin alike, so whatever
of one were found by another in the prefix cache would show.
"""

import math
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import write_random
from tests.support.replay import TOLERANCE
from tests.support.scripts import Script

pytestmark = pytest.mark.model

WINDOW, TAIL, BLOCK_SIZE = 64, 16, 32
# Of six layers: ratios 1/6, 5/18, 29/72, 41/72.
LAYERS = ["4:0", "1:1/3", "3:1/4", "2:0"]
RATIOS = {0.0: 0, 0.1: 1, None: 2, 0.5: 4}
MIXED = {"layers": ",".join(LAYERS), "ratio": 0.27, "max_ratio": 0.56}
RULE = {"window": WINDOW, "tail": TAIL}

CODE = """
import random
from tests.support.replay import Engine, Job, is_resumed
path, rule, ratios, block_size, num_blocks, is_crowd = arguments
engine = Engine(
    path, enforce_eager=True, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=16,
    block_size=block_size, num_gpu_blocks_override=num_blocks,
    additional_config={"orthorank": rule} if rule else {},
)
draw = random.Random(0)
def words(length):
    return [draw.randrange(5, 500) for _ in range(length)]
beginning = words(200)
# A prompt of each ratio begins as one of each other does, and many are the same.
prompts = [beginning + words(60), beginning + words(3), beginning[:150] + words(100), words(40)]

def answers(jobs):
    return [
        [
            job.generated,
            [
                entry[token].logprob
                for token, entry in zip(job.generated, job.output.outputs[0].logprobs)
            ],
            [
                next(iter(entry.values())).logprob
                for entry in (job.output.prompt_logprobs or []) if entry
            ],
        ]
        for job in jobs
    ]

def jobs(wants_prompt, max_tokens=6):
    return [
        Job(prompt, max_tokens, want_prompt_logprobs=wants_prompt, ratio=ratio)
        for prompt in prompts for ratio in ratios
    ]

found = {"chunked": 0, "cached": 0, "resumed": 0, "mixed": 0}
if is_crowd:
    runs = []
    # All read their prompts' log-probabilities; then with an empty cache, and with what that left.
    for wants_prompt in (True, False, False):
        mine = jobs(wants_prompt, 6 if wants_prompt else 30)
        for index, job in enumerate(mine):
            job.arrives = index // 3
        run = engine.run(mine, budget=lambda step: (100, 64, 150)[step % 3])
        runs.append(answers(mine))
        ratio_of = {name: job.ratio for name, job in run.jobs.items()}
        found["mixed"] += sum(len({ratio_of[p.request_id] for p in f}) > 1 for f in run.forwards)
        for job in mine:
            parts = run.chunks(job)
            found["resumed"] += is_resumed(run, job)
            found["cached"] += parts[0].num_computed > 0
            found["chunked"] += sum(p.num_computed < len(job.prompt) for p in parts) > 1
    answer({"answers": runs, **found})
else:
    runs = []
    for wants_prompt in (True, False):
        told = []
        for job in jobs(wants_prompt, 6 if wants_prompt else 30):
            engine.llm.reset_prefix_cache()
            engine.run([job])
            told += answers([job])
        runs.append(told)
    answer([*runs, runs[-1]])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("model")
    return write_random("Llama", path)


def starts(
    folder: str, rule: dict[str, Any] | None, ratios: list[float | None], is_crowd: bool
) -> Script:
    blocks = 28 if is_crowd else 64
    return Script(CODE, folder, rule, ratios, BLOCK_SIZE, blocks, is_crowd)


def worst_of(these: list[Any], those: list[Any]) -> float:
    """How far log-probabilities are from each other; without bound where texts are."""
    worst = 0.0
    for (text, *mine), (other_text, *theirs) in zip(these, those, strict=True):
        if text != other_text:
            return math.inf
        pairs = zip(chain(*mine), chain(*theirs), strict=True)
        worst = max([worst, *(abs(this - that) for this, that in pairs)])
    return worst


def test_each_request_of_a_mixed_batch_is_answered_as_by_a_server_of_its_ratio(folder: str) -> None:
    """Not aligned only dense prompts are: what else is computed depends on load."""
    crowds = {
        aligned: starts(folder, {**RULE, **MIXED, "aligned": aligned}, list(RATIOS), True)
        for aligned in ("on", "off")
    }
    alone = {
        ratio: starts(
            folder, {**RULE, "layers": ",".join(LAYERS[:count])} if count else None, [None], False
        ).answer
        for ratio, count in RATIOS.items()
    }
    assert all(
        worst_of(this[0], that[0]) > 100 * TOLERANCE for this, that in pairwise(alone.values())
    ), "layers so dull that nothing could be seen"
    for aligned, crowd in crowds.items():
        found = crowd.answer
        assert min(found["cached"], found["chunked"], found["mixed"], found["resumed"]) > 3, found
        for place, ratio in enumerate(RATIOS):
            worst = [
                worst_of(run[place :: len(RATIOS)], expected)
                for run, expected in zip(found["answers"], alone[ratio], strict=True)
                if aligned == "on" or ratio == 0
            ]
            assert all(difference < TOLERANCE for difference in worst), (aligned, ratio, worst)


SINKS = """
from tests.support.replay import Engine, Job
path, rule, block_size = arguments
engine = Engine(
    path, enforce_eager=True, skip_tokenizer_init=True, max_model_len=512, block_size=block_size,
    num_gpu_blocks_override=64, additional_config={"orthorank": rule},
)
prompt = [7 * n % 490 + 5 for n in range(300)]
def served(tokens, ratio):
    job = Job(tokens, 4, want_prompt_logprobs=False, ratio=ratio)
    run = engine.run([job])
    told = zip(job.generated, job.output.outputs[0].logprobs)
    return [entry[token].logprob for token, entry in told], run.chunks(job)[0].num_computed
cold, _ = served(prompt, 0.5)
engine.forget_sinks()
served([prompt[0], *range(100, 200)], None)
cached, reused = served(prompt, 0.5)
answer([cold, cached, reused])
"""


def test_a_sink_left_by_a_request_of_fewer_layers_serves_one_of_more(folder: str) -> None:
    """Break seen: written in the layers alone that some request of its step skips in."""
    cold, cached, reused = Script(SINKS, folder, {**RULE, **MIXED}, BLOCK_SIZE).answer
    assert reused >= WINDOW
    assert worst_of([["", cold]], [["", cached]]) < TOLERANCE


SHORT = """
from tests.support.replay import Engine, Job
path, rule, block_size, min_prompt = arguments
engine = Engine(
    path, enforce_eager=True, skip_tokenizer_init=True, max_model_len=512, block_size=block_size,
    num_gpu_blocks_override=64, additional_config={"orthorank": {**rule, "min_prompt": min_prompt}},
)
long = [7 * n % 490 + 5 for n in range(300)]
short = long[:min_prompt - 1]
def served(tokens, ratio=None):
    job = Job(tokens, 4, want_prompt_logprobs=False, ratio=ratio)
    run = engine.run([job])
    told = zip(job.generated, job.output.outputs[0].logprobs)
    return [entry[token].logprob for token, entry in told], run.chunks(job)[0].num_computed
alone, _ = served(long)
dense, _ = served(short, 0.0)
engine.llm.reset_prefix_cache()
first, _ = served(short)
again, reused = served(short)
after, taken = served(long)
answer([alone, after, taken, dense, first, again, reused, served(long, 0.0)[1]])
"""


def test_a_short_prompt_is_a_dense_request_and_shares_blocks_with_such_alone(folder: str) -> None:
    """Break seen: blocks of which a request of ratio 0 finds none."""
    answer = Script(SHORT, folder, {**RULE, **MIXED}, BLOCK_SIZE, 200).answer
    alone, after, taken, dense, first, again, reused, taken_densely = answer
    assert taken == 0
    assert after == pytest.approx(alone, abs=TOLERANCE)
    assert first == pytest.approx(dense, abs=TOLERANCE)
    assert again == pytest.approx(dense, abs=TOLERANCE)
    assert min(reused, taken_densely) >= 128
