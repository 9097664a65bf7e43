"""Time prompts of mixed lengths with chunks that end on windows' borders, and anywhere, in turn.

    python benchmarks/aligned.py MODEL [--budgets 512,2048] [--requests 8] [--pairs 6]

One engine, whose scheduler keeps to the borders or not: new prompts come at once and are answered
with a few tokens each. What is told is the requests per second and the steps that they took. The
last line is all of it as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

from orthorank_vllm.bench.servers import use_one_process

# Layers that choose: where all keep nothing, chunks end anywhere in any case.
LAYERS = "29,28,26,25,20,27,22,24,3"
LENGTHS = (64, 1900)
ANSWER = 16


class Engine:
    """vLLM, aligned or not from one run to the next."""

    def __init__(self, model: str, budget: int, layers: str) -> None:
        """
        Args:
            budget: the most tokens of a step.
            layers: OrthoRank's.
        """
        from vllm import LLM

        self._llm = LLM(
            model,
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=2048,
            max_num_batched_tokens=budget,
            enable_prefix_caching=False,
            additional_config={"orthorank": {"layers": layers, "stand_in": "off"}},
        )
        core: Any = self._llm.llm_engine.engine_core
        self._scheduler = core.engine_core.scheduler
        self._vocabulary = self._llm.llm_engine.vllm_config.model_config.get_vocab_size()

    def use(self, budget: int, is_aligned: bool) -> None:
        self._scheduler.max_num_scheduled_tokens = budget
        self._scheduler.need_mamba_block_aligned_split = is_aligned

    def serve(self, prompts: list[list[int]]) -> tuple[float, int]:
        """Seconds and steps."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False)
        first_step = self._scheduler.current_step
        started = time.perf_counter()
        inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        self._llm.generate(inputs, params, use_tqdm=False)
        return time.perf_counter() - started, self._scheduler.current_step - first_step

    def draw(self, lengths: list[int], numbers: random.Random) -> list[list[int]]:
        """Prompts of random tokens."""
        return [numbers.choices(range(self._vocabulary), k=length) for length in lengths]


def compare(engine: Engine, budget: int, requests: int, pairs: int) -> dict[str, Any]:
    """The same prompts both ways, A B, B A."""
    numbers = random.Random(0)
    rates: dict[bool, list[float]] = {True: [], False: []}
    steps: dict[bool, list[int]] = {True: [], False: []}
    for pair in range(-1, pairs):
        lengths = [numbers.randrange(*LENGTHS) for _ in range(requests)]
        prompts = engine.draw(lengths, numbers)
        for is_aligned in (True, False) if pair % 2 else (False, True):
            engine.use(budget, is_aligned)
            seconds, taken = engine.serve(prompts)
            # The first pair warms up.
            if pair >= 0:
                rates[is_aligned].append(requests / seconds)
                steps[is_aligned].append(taken)
    ratios = [on / off for on, off in zip(rates[True], rates[False], strict=True)]
    return {
        "budget": budget,
        "requests_per_second": {
            "aligned": statistics.median(rates[True]),
            "anywhere": statistics.median(rates[False]),
        },
        "steps": {"aligned": sum(steps[True]), "anywhere": sum(steps[False])},
        "aligned_to_anywhere": statistics.quantiles(ratios, n=4, method="inclusive"),
    }


def main() -> None:
    """Print a line for each budget, then everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a folder or hub name, as for vLLM")
    parser.add_argument("--budgets", default="512,2048", help="tokens of a step, at most")
    parser.add_argument("--requests", type=int, default=8, help="at once")
    parser.add_argument("--pairs", type=int, default=6, help="of runs, for each budget")
    parser.add_argument("--layers", default=LAYERS, help="OrthoRank's (default: %(default)s)")
    arguments = parser.parse_args()
    budgets = [int(budget) for budget in arguments.budgets.split(",")]
    use_one_process()
    engine = Engine(arguments.model, max(budgets), arguments.layers)
    results = [compare(engine, budget, arguments.requests, arguments.pairs) for budget in budgets]
    for result in results:
        rates, (low, median, high) = result["requests_per_second"], result["aligned_to_anywhere"]
        print(
            f"{result['budget']:>6} tokens a step: {rates['anywhere']:.3f} requests/s anywhere, "
            f"{rates['aligned']:.3f} aligned, {median:.3f} times ({low:.3f} to {high:.3f}), "
            f"{result['steps']['anywhere']} and {result['steps']['aligned']} steps"
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
