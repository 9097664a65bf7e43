"""Prompts that come as embeddings, in the real engine: each as the rule has it for its tokens.

Against the independent reference, by the schedule that the engine made. Its table of embeddings has
rows beyond the vocabulary: so an embedding that is no token's has an id there, and here alone. The
model scales its embeddings: those that are given, too.
"""

import random
from typing import Any

import pytest

from tests.support.models import SIZES, write_random
from tests.support.replay import SAFE_MARGIN, TOLERANCE
from tests.support.scripts import Script

pytestmark = pytest.mark.model

RULE = {"layers": [[4, 0.0], [1, 1 / 3], [3, 0.25], [2, 0.5]], "window": 64, "tail": 16}
# Of no token's embedding: ids of the reference's.
MADE_UP = range(SIZES["vocab_size"], SIZES["vocab_size"] + 4)

CODE = """
import torch
from transformers import AutoModelForCausalLM
from tests.support.reference import Reference, Rule
from tests.support.replay import Engine, Job, is_resumed, replay
path, options, made_up, prompts = arguments

model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
table = model.model.embed_tokens.weight.detach()
drawn = torch.randn(made_up, table.shape[1], generator=torch.Generator().manual_seed(3))
table = torch.cat([table, 0.08 * drawn])
model.model.embed_tokens = torch.nn.Embedding.from_pretrained(table)
rule = Rule.of(options)
references = {None: Reference(model, rule), 0.0: Reference(model, Rule({}))}

def job_of(kind, prompt, max_tokens=6, ratio=None):
    given = None
    if kind != "tokens":
        given = {"prompt_embeds": table[prompt].clone()}
    if kind == "both":
        # Tokens where there is one, as vLLM has it of a chat with such parts.
        is_token = [token < model.config.vocab_size for token in prompt]
        given["prompt_token_ids"] = [t if is_t else 0 for t, is_t in zip(prompt, is_token)]
        given["prompt_is_token_ids"] = is_token
        given["prompt_embeds"][torch.tensor(is_token)] = torch.nan
    return Job(prompt, max_tokens, want_prompt_logprobs=False, ratio=ratio, given=given)

donors = {}
def compared(run):
    told = {"worst": 0.0, "compared": 0, "margin": 1.0}
    for ratio, reference in references.items():
        verdict = replay(run.of_ratio(ratio), reference, earlier=donors.setdefault(ratio, []))
        donors[ratio] += verdict.requests.values()
        told["worst"] = max(told["worst"], verdict.worst)
        told["compared"] += verdict.compared
        told["margin"] = min(told["margin"], verdict.margin)
    return told

def first_answer(job):
    entry = job.output.outputs[0].logprobs[0]
    return [entry[job.generated[0]].logprob]

engine = Engine(
    path, enforce_eager=True, skip_tokenizer_init=True, max_model_len=512, block_size=32,
    max_num_seqs=16, num_gpu_blocks_override=40, enable_prompt_embeds=True,
    additional_config={"orthorank": options},
)
found = {"chunked": 0, "cached": 0, "mixed": 0, "resumed": 0, "lost": []}
from orthorank_vllm.model import forward as module
recompute = module.recompute_sinks
def recomputed(*given):
    found["lost"].append([len(given[3]), len(given[6])])
    return recompute(*given)
module.recompute_sinks = recomputed

jobs = [job_of(kind, prompt, 40) for kind, prompt in prompts]
jobs += [job_of(kind, prompt, 40, ratio=0.0) for kind, prompt in prompts[1:3]]
for index, job in enumerate(jobs):
    job.arrives = index // 4
run = engine.run(jobs, budget=lambda step: (130, 64, 200)[step % 3])
for forward in run.forwards:
    found["mixed"] += len({run.jobs[part.request_id].given is None for part in forward}) > 1
for job in jobs:
    parts = run.chunks(job)
    found["resumed"] += is_resumed(run, job)
    found["chunked"] += sum(part.num_computed < len(job.prompt) for part in parts) > 1
crowd = [compared(run)]

# From the prefix cache, with no sink's state: all of them are computed anew, together.
engine.llm.reset_prefix_cache()
for _ in range(2):
    engine.forget_sinks()
    found["lost"].clear()
    jobs = [job_of(kind, prompt, 2) for kind, prompt in prompts[2:]]
    run = engine.run(jobs)
    found["cached"] = sum(run.chunks(job)[0].num_computed > 0 for job in jobs)
    crowd.append(compared(run))

# A prompt of tokens, and the same one as their embeddings, each with nothing to find.
alone = []
for kind in ("tokens", "embeddings"):
    engine.llm.reset_prefix_cache()
    engine.forget_sinks()
    job = job_of(kind, prompts[0][1])
    engine.run([job])
    alone.append([job.generated, first_answer(job)])
answer({"crowd": crowd, "alone": alone, **found})
"""


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = write_random("Granite", tmp_path_factory.mktemp("embeds") / "model")
    draw = random.Random(0)

    def words(length: int) -> list[int]:
        return [draw.randrange(5, 500) for _ in range(length)]

    long, short = words(200), words(140)
    prompts = [
        # Its first token has the id that an embedding's place is filled with.
        ("tokens", [0, *long, *words(60)]),
        ("embeddings", [0, *long, *words(40)]),
        ("embeddings", [MADE_UP[0], *long, *words(50)]),
        ("embeddings", [MADE_UP[1], *long, *words(50)]),
        ("embeddings", [*short[:20], *MADE_UP, *short[20:]]),
        ("both", [MADE_UP[2], *short, MADE_UP[0], *words(30)]),
        ("both", [7, *short, MADE_UP[3], *words(30)]),
        ("tokens", [7, *short, *words(30)]),
    ]
    return Script(CODE, path, RULE, len(MADE_UP), prompts).answer


def test_an_embedded_prompt_is_answered_by_the_rule_beside_others(answer: Any) -> None:
    """In chunks, and from the prefix cache where the state of its first position was lost.

    Break seen: states kept by the id that an embedding's place is filled with; lost ones computed
    of that id.
    """
    for verdict in answer["crowd"]:
        assert verdict["compared"] > 10
        assert verdict["margin"] > SAFE_MARGIN, "take other prompts"
        assert verdict["worst"] < TOLERANCE
    assert min(answer["chunked"], answer["mixed"], answer["cached"]) > 3
    assert answer["resumed"]
    given = [embeddings for _, embeddings in answer["lost"]]
    assert sum(given) > 2
    assert sum(lost for lost, _ in answer["lost"]) > sum(given)


def test_tokens_and_their_embeddings_have_one_answer(answer: Any) -> None:
    (text, [first]), (other_text, [other]) = answer["alone"]
    assert text == other_text
    assert abs(first - other) < TOLERANCE
