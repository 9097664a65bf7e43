"""A pipeline's stages, in one process: vLLM's own pipeline does not run on CPU."""

import random
from pathlib import Path

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
path, layers, first_of_second, prompts = arguments
engine = Engine(
    path, enforce_eager=True, max_model_len=1024, block_size=32, skip_tokenizer_init=True,
    num_gpu_blocks_override=128,
    additional_config={"orthorank": {"layers": layers, "window": 32}},
)
whole = engine.model.model

def stage(start, end):
    held = [
        layer if start <= index < end else PPMissingLayer()
        for index, layer in enumerate(whole.layers)
    ]
    parts = {"layers": held, "config": whole.config, "norm": PPMissingLayer()}
    if end == len(held):
        parts["norm"] = whole.norm
    parts["embed_input_ids"] = whole.embed_input_ids if start == 0 else None
    made = SparsePrefill(engine.llm.llm_engine.vllm_config, SimpleNamespace(**parts))
    made._counter = None
    return made

class Pipeline:
    needs_profile_run = False

    def __init__(self):
        self.stages = [stage(0, first_of_second), stage(first_of_second, len(whole.layers))]
        self.skipped = [0, 0]

    def plan(self, batch):
        first, second = (stage.plan(batch) for stage in self.stages)
        assert (first is None) == (second is None)
        if first is None:
            return None
        assert (first.selected_per_request == second.selected_per_request).all()
        return first, second

    def forward(self, plans, input_ids, positions, _):
        first, second = self.stages
        sent = first.forward(plans[0], input_ids, positions, None)
        sent = IntermediateTensors({key: value.clone() for key, value in sent.items()})
        return second.forward(plans[1], None, positions, sent)

    def count(self, batch, plans, seconds):
        for index, stage in enumerate(self.stages):
            if plans is not None:
                self.skipped[index] += int(stage._outcome.skipped.sum())
            stage.count(batch, plans and plans[index], seconds)

pipeline = Pipeline()
engine.model.orthorank = pipeline
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
reference = Reference(model, Rule(tuple(layers), window=32))
run = engine.run([Job(prompt, max_tokens=2) for prompt in prompts], budget=lambda step: 100)
verdicts = [replay(run, reference)]
donors = list(verdicts[0].requests.values())
skipped = sum(donor.skipped for donor in donors)
known = Job(prompts[0] + prompts[1][:40], want_prompt_logprobs=False)
verdicts.append(replay(engine.run([known]), reference, earlier=donors))
skipped += sum(request.skipped for request in verdicts[-1].requests.values())

# The tables forget, the prefix cache does not: what comes is computed densely.
for made in pipeline.stages:
    made._sinks.clear()
counted = list(pipeline.skipped)
unknown = Job(prompts[0] + prompts[1][-60:], want_prompt_logprobs=False)
dense = Reference(model, Rule(()))
for donor in donors:
    donor.reference = dense
verdicts.append(replay(engine.run([unknown]), dense, earlier=donors))
answer({
    "worst": [verdict.worst for verdict in verdicts],
    "margin": min(verdict.margin for verdict in verdicts[:2]),
    "skipped": [sum(counted), skipped],
    "by_stage": counted,
    "skipped_unknown": sum(pipeline.skipped) - sum(counted),
})
"""


@pytest.mark.parametrize("first_of_second", [2, 3])
def test_two_stages_equal_the_reference(tmp_path: Path, first_of_second: int) -> None:
    """Cut before a selective layer, and after a dense one that follows a selective one."""
    draw = random.Random(11)
    prompts = [[draw.randrange(3, 500) for _ in range(length)] for length in (150, 90)]
    path = write_random("Llama", tmp_path / "llama")
    answer = Script(SERVE, path, [1, 3, 4], first_of_second, prompts).answer
    assert answer["margin"] > SAFE_MARGIN, "float noise chose: take other prompts"
    assert max(answer["worst"]) < TOLERANCE
    counted, wanted = answer["skipped"]
    assert counted == wanted > 0
    assert min(answer["by_stage"]) > 0
    assert answer["skipped_unknown"] == 0
