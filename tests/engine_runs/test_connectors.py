"""KV connectors beside OrthoRank, in the real engine: what they load is what was computed here.

vLLM's `ExampleConnector`, whose store is a folder, and its `OffloadingConnector` with copies that
need no GPU (`tests/support/offloading.py`).
"""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Prompts
from tests.support.offloading import CONNECTOR
from tests.support.replay import TOLERANCE
from tests.support.scripts import Script

pytestmark = pytest.mark.model

PROMPT, SHORTER, TURN, TOLD, TAIL, WINDOW = 450, 330, 100, 8, 40, 64
RULE = {"layers": "4:0,3:1/3,2", "tail": TAIL, "window": WINDOW}
ENGINE = """
from vllm.config import KVTransferConfig
from tests.support.forced_answers import ForcedAnswers, log_probs_of
from tests.support.replay import Engine, Job

def engine_with(path, connector, rule, **options):
    given = {"kv_transfer_config": KVTransferConfig(**connector)} if connector else {}
    return Engine(
        path, enforce_eager=True, max_model_len=768, block_size=32, max_num_seqs=16,
        logits_processors=[ForcedAnswers],
        additional_config={} if rule is None else {"orthorank": rule},
        **{"num_gpu_blocks_override": 64, **given, **options},
    )

def away(these, those):
    return max(abs(this - that) for this, that in zip(these, those, strict=True))
"""
STORED = (
    ENGINE
    + """
path, connector, rule, text, short, sizes = arguments
prompt_len, shorter, turn, told_len = sizes
engine = engine_with(path, connector, rule, num_gpu_blocks_override=32)
prompt, told = text[:prompt_len], text[prompt_len:prompt_len + told_len]

def asked(prompt=prompt, told=told, from_cache=False):
    if not from_cache:
        engine.llm.reset_prefix_cache()
    return log_probs_of(engine.llm, prompt, told)

found = {}
fillers = {
    "an earlier turn": (text[:shorter], text[shorter:shorter + turn]),
    "itself": (prompt, told),
    "a longer prompt": (text[:-1], text[-1:]),
}
for name, filler in fillers.items():
    engine.scheduler.reset_prefix_cache(reset_connector=True)
    alone, nothing = asked()
    engine.scheduler.reset_prefix_cache(reset_connector=True)
    asked(*filler)
    stored, loaded = asked()
    cached, _ = asked(from_cache=True)
    found[name] = {
        "nothing": nothing, "loaded": loaded, "stored": away(stored, alone),
        "cached": away(cached, alone),
    }

jobs = [Job(text, 40, want_prompt_logprobs=False) for text in short]
engine.scheduler.reset_prefix_cache(reset_connector=True)
run = engine.run(jobs)
starts = [[chunk.num_computed for chunk in run.chunks(job)] for job in jobs]
resumed = [b for of_job in starts for a, b in zip(of_job, of_job[1:]) if b < a]
worst = 0.0
for job in jobs:
    engine.scheduler.reset_prefix_cache(reset_connector=True)
    alone, _ = asked(job.prompt, job.generated)
    told = [e[t].logprob for e, t in zip(job.output.outputs[0].logprobs, job.generated)]
    worst = max(worst, away(alone, told))
answer({"filled": found, "resumed": resumed, "from_undisturbed": worst})
"""
)
APART = (
    ENGINE
    + """
path, connector, rules, prompt, told = arguments
found = {}
for name, rule in rules.items():
    for store in (None, connector):
        engine = engine_with(path, store, rule)
        first, nothing = log_probs_of(engine.llm, prompt, told)
        engine.llm.reset_prefix_cache()
        again, loaded = log_probs_of(engine.llm, prompt, told)
        if store is None:
            fresh = first
        engine.close()
    found[name] = {
        "nothing": nothing, "loaded": loaded, "first": away(first, fresh),
        "again": away(again, fresh),
    }
answer(found)
"""
)
HOOKS = (
    ENGINE
    + """
from vllm.distributed.kv_transfer import get_kv_transfer_group
path, connector, rule, prompts = arguments
engine = engine_with(path, connector, rule)
group, calls = get_kv_transfer_group(), []
wait, save, clear = group.wait_for_layer_load, group.save_kv_layer, group.clear_connector_metadata
def noted(what, original):
    def call(layer, *rest):
        calls.append((what, int(layer.split(".")[2])))
        return original(layer, *rest)
    return call
def end():
    calls.append(("end", -1))
    clear()
group.wait_for_layer_load = noted("load", wait)
group.save_kv_layer = noted("save", save)
group.clear_connector_metadata = end
engine.forget_sinks()
for way in ("cpu", "gather"):
    engine.model.orthorank.attend_by(way)
    engine.run([Job(prompt) for prompt in prompts], budget=lambda step: 150)
answer([calls, len(engine.model.orthorank._sinks)])
"""
)


def in_folder(folder: Path) -> dict[str, Any]:
    return {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }


def down_to_window(tokens: int) -> int:
    return (tokens - TAIL) // WINDOW * WINDOW


@pytest.fixture(scope="module")
def offloaded(small_model_path: str, text_tokens: list[int]) -> dict[str, Any]:
    prompts = Prompts(text_tokens, seed=5)
    text, short = prompts.take(600), [prompts.take(190) for _ in range(6)]
    sizes = [PROMPT, SHORTER, TURN, TOLD]
    return dict(Script(STORED, small_model_path, CONNECTOR, RULE, text, short, sizes).answer)


def test_a_stored_prefix_answers_as_the_prefix_cache(offloaded: dict[str, Any]) -> None:
    """Whoever stored it: of an earlier turn, its prompt's windows before the tail and no more."""
    filled = offloaded["filled"]
    assert {name: one["loaded"] for name, one in filled.items()} == {
        "an earlier turn": down_to_window(SHORTER),
        "itself": down_to_window(PROMPT),
        "a longer prompt": down_to_window(PROMPT),
    }
    assert all(one["nothing"] == 0 for one in filled.values())
    assert all(one["stored"] < TOLERANCE for one in filled.values()), filled
    assert all(one["cached"] < TOLERANCE for one in filled.values()), filled


def test_a_preempted_request_that_is_loaded_answers_as_if_it_had_not_been(
    offloaded: dict[str, Any],
) -> None:
    assert max(offloaded["resumed"]) > 0, "nothing was preempted, or nothing was loaded again"
    assert max(offloaded["resumed"]) <= down_to_window(190)
    assert offloaded["from_undisturbed"] < TOLERANCE


def test_what_one_configuration_stored_no_other_loads(
    small_model_path: str, text_tokens: list[int], tmp_path: Path
) -> None:
    """Nor stock vLLM, nor from it; each loads its own, and answers as without a store."""
    text = Prompts(text_tokens, seed=6).take(PROMPT + TOLD)
    rules = {"one ratio": RULE, "another": {**RULE, "layers": "4:0,3:1/3"}, "stock vLLM": None}
    asked = (in_folder(tmp_path), rules, text[:PROMPT], text[PROMPT:])
    found = Script(APART, small_model_path, *asked).answer
    assert {name for name, one in found.items() if one["nothing"]} == set()
    assert all(one["loaded"] > 0 for one in found.values()), found
    assert all(one["first"] < TOLERANCE for one in found.values()), found
    assert all(one["again"] < TOLERANCE for one in found.values()), found


def test_each_layer_is_loaded_before_it_is_saved_and_once_in_a_forward(
    small_model_path: str, text_tokens: list[int], tmp_path: Path
) -> None:
    """Whatever it computes: all rows, some, none. A sink that is computed anew tells nobody."""
    prompts = Prompts(text_tokens, seed=7)
    texts = [prompts.take(length) for length in (400, 90)]
    rule = {**RULE, "layers": "5:0,4:0,3:1/3,2", "tail": 1}
    asked = (in_folder(tmp_path), rule, texts)
    calls, sinks = Script(HOOKS, small_model_path, *asked).answer
    forward = [[what, layer] for layer in range(6) for what in ("load", "save")]
    split: list[list[Any]] = [[]]
    for what, layer in calls:
        if what == "end":
            split.append([])
        else:
            split[-1].append([what, layer])
    assert len(split) > 6
    assert all(found in (forward, []) for found in split), split
    assert sinks > 0, "no sink was needed"
