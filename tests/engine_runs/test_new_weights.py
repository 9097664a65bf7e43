"""Weights that change while an engine runs; and a sleep, which on CPU changes nothing."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Prompts
from tests.support.replay import TOLERANCE
from tests.support.scripts import Script

pytestmark = pytest.mark.model

CODE = """
import logging
from dataclasses import replace
from vllm.v1.worker.gpu_worker import Worker
from tests.support.forced_answers import ForcedAnswers, log_probs_of
from tests.support.replay import Engine
path, other_path, rule, prompt, told = arguments

said = []
class Heard(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())

def engine_of(path):
    return Engine(
        path, enforce_eager=True, max_model_len=384, num_gpu_blocks_override=16, block_size=32,
        logits_processors=[ForcedAnswers], additional_config={"orthorank": rule},
    )

def asked(engine):
    engine.llm.reset_prefix_cache()
    # The second time without position 0: its state is remembered, or computed anew.
    return [log_probs_of(engine.llm, prompt, told)[0] for _ in range(2)]

def away(these, those):
    return max(abs(a - b) for this, that in zip(these, those) for a, b in zip(this, that))

engine = engine_of(other_path)
fresh = asked(engine)
engine.close()
engine = engine_of(path)
orthorank = engine.model.orthorank
before = asked(engine)
engine.llm.sleep(1)
engine.llm.wake_up()
woken = asked(engine)
# As if a profile had given the layers.
orthorank.config = replace(orthorank.config, measured_on=engine.model.fingerprint.value)
cut = {layer: kept.split for layer, kept in orthorank._selective.items()}
# Not before: vLLM takes handlers away when an engine starts.
logging.getLogger("vllm.orthorank").addHandler(Heard())
engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
same = asked(engine)
told_of_same = len(said)
engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": other_path})
sinks = len(orthorank._sinks)
renewed = asked(engine)
engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
back = asked(engine)
engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": other_path})
asked(engine)
answer({
    "woken": away(woken, before), "same": away(same, before), "back": away(back, before),
    "renewed": away(renewed, fresh), "moved": away(renewed, before), "sinks": sinks,
    "cut_anew": [
        kept.split is not None and kept.split is not cut[layer]
        for layer, kept in orthorank._selective.items()
    ],
    "said_of_same": told_of_same, "said": said,
    "hooked": [
        hasattr(getattr(Worker, name), "_orthorank_hook")
        for name in ("reload_weights", "wake_up", "finish_weight_update")
    ],
})
"""


@pytest.fixture(scope="module")
def answer(
    small_model_path: str, text_tokens: list[int], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    other = write_other(small_model_path, tmp_path_factory.mktemp("models") / "other")
    text = Prompts(text_tokens, seed=9).take(300)
    rule = {"layers": "4:0,3:1/3,2", "tail": 40, "window": 64}
    return Script(CODE, small_model_path, str(other), rule, text, text[:6]).answer


def write_other(path: str, folder: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(2)
    # Not the embeddings: on CPU stock vLLM does not renew the output layer that shares them.
    for weight in model.model.layers.parameters():
        weight.data *= torch.empty_like(weight).uniform_(0.9, 1.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return folder


def test_after_a_sleep_the_answer_is_the_one_before(answer: dict[str, Any]) -> None:
    assert answer["woken"] < TOLERANCE


def test_new_weights_answer_as_in_a_fresh_engine(answer: dict[str, Any]) -> None:
    """Of all that a layer has, its cut and packed copies among it, nothing old is left."""
    assert answer["renewed"] < TOLERANCE < answer["moved"]
    assert max(answer["same"], answer["back"]) < TOLERANCE
    assert answer["sinks"] == 0
    assert all(answer["cut_anew"])


def test_layers_that_were_measured_on_others_are_named_once(answer: dict[str, Any]) -> None:
    assert answer["said_of_same"] == 0
    assert len(answer["said"]) == 1
    assert "was measured on other weights of this shape" in answer["said"][0]


def test_weights_that_pass_no_method_of_the_models_are_noticed_too(answer: dict[str, Any]) -> None:
    assert all(answer["hooked"])
