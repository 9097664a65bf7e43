"""A pipeline's stages, in one process: vLLM's own pipeline does not run on CPU."""

import random
from typing import Any

import pytest

from tests.support.models import write_random
from tests.support.replay import SAFE_MARGIN, TOLERANCE
from tests.support.scripts import Script

pytestmark = pytest.mark.model

# The loaded model as two stages, each with its own tables. What the first hands on is copied, as on
# its way to another process.
SERVE = """
from types import SimpleNamespace
import torch
from transformers import AutoModelForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.sequence import IntermediateTensors
from orthorank_vllm.engine.prefill import SparsePrefill
from tests.support.reference import Reference, Rule
from tests.support.replay import Engine, Job, replay
path, cases, prompts = arguments
engine = Engine(
    path, enforce_eager=True, max_model_len=1024, block_size=32, skip_tokenizer_init=True,
    num_gpu_blocks_override=128, additional_config={"orthorank": cases[0][0]},
)
whole, orthorank = engine.model.model, engine.model.orthorank
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

def stage(start, end):
    held = [
        layer if start <= index < end else PPMissingLayer()
        for index, layer in enumerate(whole.layers)
    ]
    parts = {"layers": held, "config": whole.config, "norm": PPMissingLayer()}
    if end == len(held):
        parts["norm"] = whole.norm
    parts["embed_tokens"] = whole.embed_tokens if start == 0 else None
    made = SparsePrefill(engine.llm.llm_engine.vllm_config, SimpleNamespace(**parts))
    made._counter = None
    made.use_layers(orthorank.config)
    return made

def skipped_by(plan, outcome):
    return sum(plan.num_tokens - quota.num_selected for quota in outcome.quotas.values())

class Plans(tuple):
    batch = property(lambda self: self[0].batch)

class Pipeline:
    needs_profile_run = needs_warm_up = False
    shadow_rows = None

    def __init__(self, first_of_second):
        self.stages = [stage(0, first_of_second), stage(first_of_second, len(whole.layers))]
        self.skipped = [0, 0]
        self.config = orthorank.config

    def plan(self, batch):
        first, second = (stage.plan(batch) for stage in self.stages)
        assert (first is None) == (second is None)
        if first is None:
            return None
        assert first.forced_rows.tolist() == second.forced_rows.tolist()
        return Plans((first, second))

    def forward(self, plans, input_ids, positions, *_):
        first, second = self.stages
        sent = first.forward(plans[0], input_ids, positions, None)
        sent = IntermediateTensors({key: value.clone() for key, value in sent.items()})
        return second.forward(plans[1], None, positions, sent)

    def count(self, batch, plans, seconds):
        for index, stage in enumerate(self.stages):
            if plans is not None:
                self.skipped[index] += skipped_by(plans[index], stage._outcome)
            stage.count(batch, plans and plans[index], seconds)

def serve(rule, first_of_second):
    engine.model.orthorank = orthorank
    engine.use(Rule.of(rule))
    pipeline = engine.model.orthorank = Pipeline(first_of_second)
    reference = Reference(model, Rule.of(rule))
    run = engine.run([Job(prompt, max_tokens=2) for prompt in prompts], budget=lambda step: 100)
    verdicts = [replay(run, reference)]
    donors = list(verdicts[0].requests.values())
    skipped = sum(donor.skipped for donor in donors)
    known = Job(prompts[0] + prompts[1][:40], want_prompt_logprobs=False)
    verdicts.append(replay(engine.run([known]), reference, earlier=donors))
    skipped += sum(request.skipped for request in verdicts[-1].requests.values())

    # The tables forget, the prefix cache does not: what has to be scored is computed densely.
    for made in pipeline.stages:
        made._sinks.clear()
    counted = list(pipeline.skipped)
    unknown = Job(prompts[0] + prompts[1][-60:], want_prompt_logprobs=False)
    is_scored = any(keep for _, keep in rule["layers"])
    later = Reference(model, Rule({})) if is_scored else reference
    for donor in donors:
        donor.reference = later
    verdicts.append(replay(engine.run([unknown]), later, earlier=donors))
    return {
        "worst": [verdict.worst for verdict in verdicts],
        "margin": min(verdict.margin for verdict in verdicts),
        "skipped": [sum(counted), skipped],
        "by_stage": counted,
        "skipped_unknown": sum(pipeline.skipped) - sum(counted),
    }

answer([serve(*case) for case in cases])
"""
SCORED = {"layers": [[1, 1 / 3], [3, 0], [4, 0.25]], "window": 32, "tail": 5}
NOTHING_KEPT = {"layers": [[1, 0], [4, 0]], "window": 32, "tail": 5}
# Cut before a selective layer, after a dense one that follows a selective one, with all that scores
# in one stage, and where nothing is scored.
CASES = [
    (SCORED, 3),
    (SCORED, 2),
    ({**SCORED, "layers": [[1, 0], [3, 0], [4, 0.25]]}, 2),
    (NOTHING_KEPT, 3),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    draw = random.Random(11)
    prompts = [[draw.randrange(3, 500) for _ in range(length)] for length in (150, 90)]
    path = write_random("Llama", tmp_path_factory.mktemp("models") / "llama")
    found: list[dict[str, Any]] = Script(SERVE, path, CASES, prompts).answer
    return found


@pytest.mark.parametrize("case", range(len(CASES)))
def test_two_stages_equal_the_reference(answers: list[dict[str, Any]], case: int) -> None:
    """Guards against: a table that one stage alone keeps, because it alone scores."""
    answer = answers[case]
    assert answer["margin"] > SAFE_MARGIN, "float noise chose: take other prompts"
    assert max(answer["worst"]) < TOLERANCE
    counted, wanted = answer["skipped"]
    assert counted == wanted > 0
    assert min(answer["by_stage"]) > 0
    assert (answer["skipped_unknown"] > 0) == (CASES[case][0] is NOTHING_KEPT)
