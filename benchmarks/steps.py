"""Time vLLM's steps with and without OrthoRank, in one process on a CPU.

    python tools/time_steps.py MODEL [--lengths 32,128,512,2048] [--pairs 20]

Two servers of the same vLLM differ by more than what is looked for here: what memory each happens
to get decides. So this is one engine, whose prompts take stock vLLM's compiled forward and the
sparse one in turn. It prints what a prompt's forward takes either way, what planning and selecting
take of it, and what a step of decoding pays for the plugin.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from orthorank_vllm.bench.servers import ENVIRONMENT

RATIO = 0.3
BATCHES = (1, 8, 64)
DECODED = 64
DECODE_PROMPT = 32
WARM_UPS = 2
# The engine in this process, where the clocks are.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}


@dataclass
class Step:
    """Seconds of one step.

    Attributes:
        all: from before the plugin's hook until after it.
        model: the model's forward.
        plan, selection: parts of these two.
    """

    all: float = 0.0
    model: float = 0.0
    plan: float = 0.0
    selection: float = 0.0


@dataclass
class Engine:
    """vLLM with clocks around the parts of its steps.

    Attributes:
        is_stock: whether steps get no plan, so that they take stock vLLM's path.
        steps: those since they were last cleared.
    """

    llm: Any
    is_stock: bool = False
    steps: list[Step] = field(default_factory=list)
    _now: Step = field(default_factory=Step)

    def watch(self) -> None:
        """Put the clocks in place, for the rest of this process."""
        from orthorank_vllm.selection.topk import SegmentedTopK

        runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        model = runner.get_model()
        plan = self._timed(model.orthorank.plan, "plan")
        model.orthorank.plan = lambda batch: None if self.is_stock else plan(batch)
        model.forward = self._timed(model.forward, "model")
        top_k: Any = SegmentedTopK
        top_k.rows = self._timed(top_k.rows, "selection")
        whole = self._timed(runner._model_forward, "all")

        def step(*args: Any, **kwargs: Any) -> Any:
            self._now = Step()
            self.steps.append(self._now)
            return whole(*args, **kwargs)

        runner._model_forward = step

    def generate(self, prompts: list[list[int]], outputs: int) -> list[Step]:
        """The steps that it took."""
        from vllm import SamplingParams

        self.steps.clear()
        params = SamplingParams(temperature=0, max_tokens=outputs, ignore_eos=True)
        self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
        return list(self.steps)

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            seconds = getattr(self._now, part) + time.perf_counter() - started
            setattr(self._now, part, seconds)
            return result

        return timed


def time_prefill(engine: Engine, draw: Callable[[int], list[int]], length: int, pairs: int) -> str:
    """One row: a prompt's forward by either path."""
    found: dict[bool, list[Step]] = {True: [], False: []}
    for number in range(WARM_UPS + pairs):
        prompt = draw(length)
        for is_stock in (True, False) if number % 2 else (False, True):
            engine.is_stock = is_stock
            [step] = engine.generate([prompt], 1)
            found[is_stock].append(step)
    stock, sparse = (found[is_stock][WARM_UPS:] for is_stock in (True, False))
    ratios = sorted(theirs.all / ours.all for theirs, ours in zip(stock, sparse, strict=True))
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    whole, plan, selection = (
        1e3 * statistics.median(getattr(step, part) for step in sparse)
        for part in ("all", "plan", "selection")
    )
    return (
        f"| {length} tokens | {1e3 * statistics.median(step.all for step in stock):.1f} ms "
        f"| {whole:.1f} ms | {median:.3f} | {low:.3f} to {high:.3f} | {plan:.2f} ms "
        f"| {selection:.2f} ms | {(plan + selection) / whole:.1%} |"
    )


def time_decode(engine: Engine, draw: Callable[[int], list[int]], batch: int, runs: int) -> str:
    """One row: a step of decoding, and the part of it outside the model's forward."""
    engine.is_stock = False
    steps = []
    for _ in range(runs):
        prompts = [draw(DECODE_PROMPT) for _ in range(batch)]
        steps += [step for step in engine.generate(prompts, DECODED) if not step.plan]
    whole = statistics.median(step.all for step in steps)
    hook = statistics.median(step.all - step.model for step in steps)
    return f"| {batch} | {1e3 * whole:.1f} ms | {1e6 * hook:.0f} µs | {hook / whole:.2%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--lengths", default="32,128,512,2048", help="of prompts, in tokens")
    parser.add_argument("--pairs", type=int, default=20, help="of forwards, at each length")
    arguments = parser.parse_args()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    for name, value in {**ENVIRONMENT, **ONE_PROCESS}.items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    room = max(*lengths, DECODE_PROMPT) + DECODED
    llm = LLM(
        arguments.model,
        dtype="float32",
        max_model_len=room,
        max_num_batched_tokens=max(room, 2048),
        enable_prefix_caching=False,
        additional_config={"orthorank": {"ratio": RATIO}},
    )
    engine = Engine(llm)
    engine.watch()
    vocabulary = range(llm.llm_engine.vllm_config.model_config.get_vocab_size())
    numbers = random.Random(0)

    def draw(length: int) -> list[int]:
        return numbers.choices(vocabulary, k=length)

    print("| prompt | stock | sparse | times as fast | quartiles | plan | selection | share |")
    print("|---|---|---|---|---|---|---|---|")
    for length in lengths:
        print(time_prefill(engine, draw, length, arguments.pairs), flush=True)
    print("\n| decoding at once | step | the plugin's part | share |\n|---|---|---|---|")
    for batch in BATCHES:
        print(time_decode(engine, draw, batch, max(arguments.pairs // 4, 1)), flush=True)


if __name__ == "__main__":
    main()
