"""Without a ratio vLLM is what it was; with one it is never silently without OrthoRank."""

import pytest

from tests.support.scripts import Script

pytestmark = pytest.mark.model

# With each of some options in turn: an engine's outputs to the last bit, and its model's classes.
GENERATE = """
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
model_path, several = arguments
prompts = [{"prompt_token_ids": [7 * i % 4099 + 20 for i in range(n)]} for n in (300, 5, 129)]
sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=2, prompt_logprobs=1)
def exact(entries):
    return [{t: e.logprob.hex() for t, e in (entry or {}).items()} for entry in entries]
def run(options):
    llm = LLM(model_path, dtype="float32", enforce_eager=True, max_model_len=512, **options)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return [
        [
            [exact(o.prompt_logprobs), exact(o.outputs[0].logprobs), list(o.outputs[0].token_ids)]
            for o in outputs
        ],
        [f"{c.__module__}.{c.__qualname__}" for c in type(runner.get_model()).__mro__],
        hasattr(type(runner)._model_forward, "_orthorank_hook"),
    ]
found = []
for options in several:
    found.append(run(options))
    cleanup_dist_env_and_memory()
answer(found)
"""


def test_ratio_0_and_no_option_are_stock_vllm_bit_for_bit(small_model_path: str) -> None:
    """Break seen: the runner hooked in every worker."""
    [stock] = Script(GENERATE, small_model_path, [{}], VLLM_PLUGINS="").answer
    off = {"additional_config": {"orthorank": {"ratio": 0}}}
    assert Script(GENERATE, small_model_path, [{}, off]).answer == [stock, stock]


def test_a_worker_that_does_not_load_the_plugin_stops_the_start_up(small_model_path: str) -> None:
    script = Script(
        """
import os
from vllm import LLM
from vllm.plugins import load_general_plugins
load_general_plugins()
os.environ["VLLM_PLUGINS"] = "some_other_plugin"
LLM(arguments[0], dtype="float32", enforce_eager=True, max_model_len=512,
    additional_config={"orthorank": {"layers": [3]}})
answer("started")
""",
        small_model_path,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_WORKER_MULTIPROC_METHOD="spawn",
    )
    assert script.exit_status != 0
    assert "ANSWER" not in script.output
    assert "OrthoRankLlamaForCausalLM" in script.output
