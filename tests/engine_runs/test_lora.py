"""LoRA adapters in the real engine: each request as by a model that its own was merged with.

Four adapters and the base model in one batch, against the independent reference on merged weights,
by the schedule that the engine made.
"""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.adapters import ATTENTION, EMBEDDING, EVERYWHERE, write_adapter
from tests.support.models import write_random
from tests.support.replay import SAFE_MARGIN, TOLERANCE
from tests.support.scripts import Script

pytestmark = pytest.mark.model

RULE = {"layers": [[4, 0.0], [1, 1 / 3], [3, 0.25], [2, 0.5]], "window": 64, "tail": 16}
# Their seeds, ranks and layers. vLLM gives the place behind the last to rows without an adapter,
# on CPU: it stays empty.
ADAPTERS = [
    (1, 8, EVERYWHERE),
    (2, 8, EVERYWHERE),
    (3, 4, ATTENTION),
    (4, 8, (*EVERYWHERE, EMBEDDING)),
]

COMMON = """
import torch
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest
from tests.support.adapters import merge
from tests.support.reference import Reference, Rule, with_stand_ins
from tests.support.replay import Engine, Job, Run, replay
path, options, folders, prompts = arguments

LORA = {"enable_lora": True, "max_loras": len(folders) + 1, "max_lora_rank": 8}
SIZES = {
    "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 512, "block_size": 32,
    "max_num_seqs": 16,
}

def merged(folder):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model if folder is None else merge(model, folder)

def told(job):
    pairs = zip(job.generated, job.output.outputs[0].logprobs)
    return job.generated, [entry[token].logprob for token, entry in pairs]

def jobs_of(loras, max_tokens, prompts=prompts, ratio=None):
    return [
        Job(prompt, max_tokens, want_prompt_logprobs=False, ratio=ratio, lora=lora)
        for prompt in prompts for lora in loras
    ]

donors = {}
def compared(run):
    verdicts = []
    for key, reference in references.items():
        mine = {
            name: job for name, job in run.jobs.items()
            if (job.lora and job.lora.lora_path, job.ratio) == key
        }
        forwards = [[part for part in f if part.request_id in mine] for f in run.forwards]
        verdict = replay(Run(mine, forwards), reference, earlier=donors.setdefault(key, []))
        donors[key] += verdict.requests.values()
        verdicts.append(verdict)
    return [
        max(v.worst for v in verdicts), sum(v.compared for v in verdicts),
        min(v.margin for v in verdicts),
    ]

loras = [None, *(LoRARequest(f"adapter-{i}", i + 1, f) for i, f in enumerate(folders))]
models = [merged(lora and lora.lora_path) for lora in loras]
"""
CODE = """
rule = with_stand_ins(Rule.of(options), models[0].config.hidden_size, knows_errors=[3])
references = {
    (lora and lora.lora_path, ratio): Reference(model, rule if ratio is None else Rule({}))
    for lora, model in zip(loras, models) for ratio in (None, 0.0)
}

engine = Engine(
    path, num_gpu_blocks_override=48, additional_config={"orthorank": options}, **LORA, **SIZES
)
engine.use(rule)
found = {"chunked": 0, "cached": 0, "mixed": 0, "lost": 0}
from orthorank_vllm.model import forward as module
from orthorank_vllm.offline import worker_calls
from orthorank_vllm.selection.method import Method
recompute = module.recompute_sinks
def recomputed(*given):
    found["lost"] += len(given[3])
    return recompute(*given)
module.recompute_sinks = recomputed

jobs = jobs_of(loras, 10) + jobs_of(loras, 10, prompts[:1], ratio=0.0)
for index, job in enumerate(jobs):
    job.arrives = index // 4
run = engine.run(jobs, budget=lambda step: (130, 64, 200)[step % 3])
for forward in run.forwards:
    found["mixed"] += len({run.jobs[part.request_id].lora for part in forward}) > 2
for job in jobs:
    parts = run.chunks(job)
    found["cached"] += parts[0].num_computed > 0
    found["chunked"] += sum(part.num_computed < len(job.prompt) for part in parts) > 1
crowd = [compared(run)]
firsts = [told(job)[1] for job in jobs[:len(loras)]]
# From the prefix cache, with no sink's state: all of them are computed anew, together.
engine.llm.reset_prefix_cache()
for _ in range(2):
    engine.forget_sinks()
    crowd.append(compared(engine.run(jobs_of(loras, 2, prompts[:1]))))
apart = min(
    max(abs(a - b) for a, b in zip(this, that))
    for i, this in enumerate(firsts) for that in firsts[:i]
)

# An adapter that takes another's id and place while its own blocks are still in the prefix cache.
engine.llm.reset_prefix_cache()
other = LoRARequest("another", 1, folders[1])
swapped, reused = [], []
for lora in (loras[1], other, loras[1]):
    places = engine.model.lora_manager.lora_index_to_id
    engine.llm.llm_engine.remove_lora(1)
    job = Job(prompts[0], 6, want_prompt_logprobs=False, lora=lora)
    run = engine.run([job])
    swapped.append(compared(run)[0])
    reused.append(run.chunks(job)[0].num_computed)
    place = places.index(1)
    assert place == 0

# What a calibration at start-up measures; the last step's rows had an adapter.
[[score]] = engine.core.model_executor.collective_rpc(
    worker_calls.score_texts, args=([prompts[0]], [1], {}, Method(), False)
)
of_base = references[None, 0.0].start(prompts[0]).forward(0, len(prompts[0]))
of_base = float(of_base[:-1].gather(1, torch.tensor(prompts[0][1:])[:, None]).sum())

dense = jobs_of(loras, 8, ratio=0.0)
engine.llm.reset_prefix_cache()
engine.run(dense)
engine.close()
stock = Engine(path, num_gpu_blocks_override=48, **LORA, **SIZES)
as_stock = jobs_of(loras, 8)
stock.run(as_stock)
answer({
    "crowd": crowd, "apart": apart, **found, "swapped": swapped, "reused": reused,
    "measured": score.log_prob - of_base,
    "dense": [told(job) for job in dense], "stock": [told(job) for job in as_stock],
})
"""
# Of two processes each has a part of every projection, and of an adapter's.
PARALLEL = """
references = {
    (lora and lora.lora_path, None): Reference(model, Rule.of(options))
    for lora, model in zip(loras, models)
}
engine = Engine(
    path, num_gpu_blocks_override=48, tensor_parallel_size=2,
    additional_config={"orthorank": options}, **LORA, **SIZES
)
answer(compared(engine.run(jobs_of(loras, 2, prompts[:1]))))
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """A model, the rule, adapters of the model, and prompts."""
    import transformers

    folder: Path = tmp_path_factory.mktemp("lora")
    path = write_random("Llama", folder / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    folders = [
        write_adapter(model, folder / str(seed), seed, rank, modules)
        for seed, rank, modules in ADAPTERS
    ]
    draw = random.Random(0)
    beginning = [draw.randrange(5, 500) for _ in range(170)]
    prompts = [
        beginning[:kept] + [draw.randrange(5, 500) for _ in range(more)]
        for kept, more in ((170, 80), (150, 103), (0, 40))
    ]
    return [path, RULE, folders, prompts]


@pytest.fixture(scope="module")
def answer(given: list[Any]) -> Any:
    return Script(COMMON + CODE, *given).answer


def test_each_request_of_a_batch_is_answered_as_by_its_adapters_merged_model(
    answer: dict[str, Any],
) -> None:
    """In chunks, from the prefix cache, and where the state of its first token was lost.

    Break seen: one state of a first token for all adapters.
    """
    counted = {name: answer[name] for name in ("chunked", "cached", "mixed", "lost")}
    assert min(counted.values()) > 3, counted
    assert answer["apart"] > 100 * TOLERANCE, "adapters so dull that nothing could be seen"
    for worst, compared, margin in answer["crowd"]:
        assert compared >= 10
        assert margin > SAFE_MARGIN, "choices so close that they prove nothing"
        assert worst < TOLERANCE


def test_an_adapter_that_takes_anothers_place_is_not_given_its_sinks(
    answer: dict[str, Any],
) -> None:
    assert answer["reused"][0] == 0 < answer["reused"][2]
    assert max(answer["swapped"]) < TOLERANCE


def test_what_is_measured_beside_adapters_is_the_base_model(answer: dict[str, Any]) -> None:
    assert abs(answer["measured"]) < TOLERANCE


def test_dense_requests_with_adapters_are_stock_vllms(answer: dict[str, Any]) -> None:
    assert answer["dense"] == answer["stock"]


def test_adapters_are_added_up_over_tensor_parallel_ranks(given: list[Any]) -> None:
    """Break seen: the narrow product added up over the ranks by itself."""
    worst, compared, margin = Script(COMMON + PARALLEL, *given).answer
    assert compared >= 10
    assert margin > SAFE_MARGIN
    assert worst < TOLERANCE
