"""The same prompts alone and in a crowd: what is chosen of them, and what they are answered.

In the crowd they come at random, with little room in a step, find each other's beginnings in the
prefix cache, and are preempted. See `CODE`.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.support.models import write_random
from tests.support.replay import TOLERANCE
from tests.support.scripts import Script

pytestmark = pytest.mark.model

WINDOW, TAIL, BLOCK_SIZE, NUM_BLOCKS = 64, 16, 32, 17
RULE = {"layers": "1:1/3,2:0,4:1/4", "window": WINDOW, "tail": TAIL}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}

CODE = """
import random
from tests.support.replay import SAFE_MARGIN, Engine, Job, is_resumed
from tests.support.watched import Choices
path, rule, count, block_size, num_blocks, options = arguments
window = rule["window"]
engine = Engine(
    path, enforce_eager=True, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=16,
    block_size=block_size, num_gpu_blocks_override=num_blocks,
    additional_config={"orthorank": rule}, **options,
)
draw = random.Random(0)
def words(length):
    return [draw.randrange(5, 500) for _ in range(length)]
beginnings = [words(200) for _ in range(8)]

def drawn():
    prompt = draw.choice(beginnings)[: draw.randrange(200)] + words(draw.randrange(1, 80))
    return prompt, draw.choice([2, 2, 30])

texts = [drawn() for _ in range(count)]
def jobs():
    return [
        Job(prompt, answer, arrives=draw.randrange(2 * count), want_prompt_logprobs=False)
        for prompt, answer in texts
    ]

def chosen_of(run, job):
    name = next(name for name, other in run.jobs.items() if other is job)
    return name, choices.chosen[name]

choices = Choices(engine.runner)
alone = jobs()
alone_runs = []
for job in alone:
    job.arrives = 0
    engine.llm.reset_prefix_cache()
    alone_runs.append(engine.run([job]))
engine.llm.reset_prefix_cache()
crowd = jobs()
run = engine.run(crowd, budget=lambda step: (window, 70, 100, 150)[step % 4])

found = {"cached": 0, "resumed": 0, "cut": 0, "near": 0, "otherwise": 0, "worst": 0.0, "texts": 0,
         "chosen": 0, "guessed": 0}
for one, own_run, other in zip(alone, alone_runs, crowd, strict=True):
    name, mine = chosen_of(own_run, one)
    if choices.margin[name] < SAFE_MARGIN:
        found["near"] += 1
        continue
    other_name, theirs = chosen_of(run, other)
    parts = run.chunks(other)
    resumed = is_resumed(run, other)
    found["resumed"] += resumed
    found["cached"] += parts[0].num_computed > 0
    prompt_parts = [part for part in parts if part.num_computed < len(other.prompt)]
    found["cut"] += len(prompt_parts) > 1 and not resumed
    found["guessed"] += any(
        part.num_tokens > 1 and part.num_computed >= len(other.prompt) for part in parts
    )
    found["chosen"] += len(theirs)
    found["otherwise"] += other_name in choices.changed or theirs != {
        place: mine.get(place) for place in theirs
    }
    found["texts"] += one.generated != other.generated
    answers = [job.output.outputs[0].logprobs for job in (one, other)]
    for token, *entries in zip(one.generated, *answers):
        these = [entry[token].logprob for entry in entries if token in entry]
        found["worst"] = max([found["worst"], *(abs(these[0] - this) for this in these)])
answer(found)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("model")
    return write_random("Llama", path)


def served(folder: str, count: int, aligned: str = "on", **options: Any) -> dict[str, Any]:
    """How the answers in a crowd differ from those alone, and what happened in it."""
    rule = {**RULE, "aligned": aligned}
    found: dict[str, Any] = Script(
        CODE, folder, rule, count, BLOCK_SIZE, NUM_BLOCKS, options
    ).answer
    # Float noise might have turned few choices.
    assert found["near"] < count / 10, found
    assert min(found["cached"], found["cut"]) > count / 10, found
    return found


def test_what_is_computed_of_a_prompt_is_the_same_in_a_crowd_as_alone(folder: str) -> None:
    """Break seen: vLLM's own hashes, by which a window's first block is taken from a prompt whose
    window goes on otherwise: four answers off by up to 0.03 nats, with the same choices."""
    found = served(folder, 200)
    assert found["resumed"] > 3, found
    assert found["otherwise"] == 0, found
    assert found["texts"] == 0, found
    assert found["worst"] < TOLERANCE, found


def test_and_so_it_is_where_tokens_are_guessed(folder: str) -> None:
    found = served(folder, 20, speculative_config=NGRAM)
    assert found["guessed"] > 2, found
    assert found["otherwise"] == 0, found
    assert found["texts"] == 0, found
    assert found["worst"] < TOLERANCE, found


def test_unaligned_it_depends_on_who_else_is_served(folder: str) -> None:
    """What the others would not be seen without."""
    found = served(folder, 20, aligned="off")
    assert found["otherwise"] > 5, found
    assert found["worst"] > 100 * TOLERANCE, found
