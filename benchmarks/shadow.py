"""What prompts that are computed once more, densely, cost: with all of them, and with none.

    python benchmarks/shadow.py MODEL [--ratio 0.3] [--requests 24] [--length 512] [--pairs 3]

One engine, in turn: new prompts, some at a time, each answered with a few tokens; then until the
engine is idle. What is told is processor time, so that other programs disturb it little: of a
request, of a step of decoding alone and with a part of a re-run beside it, and of the engine's own
bookkeeping in a step. The last line is all of it as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import replace
from typing import Any

from orthorank_vllm.bench.servers import use_one_process

ANSWER = 16
AT_ONCE = 4


class Engine:
    """vLLM, with re-runs or without from one run to the next."""

    def __init__(self, model: str, ratio: float) -> None:
        from vllm import LLM

        self._llm = LLM(
            model,
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=2048,
            max_num_seqs=2 * AT_ONCE,
            enforce_eager=True,
            enable_prefix_caching=False,
            additional_config={"orthorank": {"ratio": ratio, "shadow": 1.0}},
        )
        core: Any = self._llm.llm_engine.engine_core
        self._core = core.engine_core
        self._scheduler = self._core.scheduler
        runner = self._core.model_executor.driver_worker.worker.model_runner
        self._orthorank = runner.get_model().orthorank
        self._runs = self._scheduler.orthorank_reruns
        self._inner_schedule = self._scheduler.schedule
        self._vocabulary = self._llm.llm_engine.vllm_config.model_config.get_vocab_size()

    def serve(self, share: float, requests: int, length: int, seed: int) -> dict[str, list[float]]:
        """Processor time of all of it, and of its steps of decoding, by whether a re-run was in."""
        from vllm import SamplingParams

        config = replace(self._orthorank.config, shadow=share)
        self._orthorank.config = self._runs._config = config
        told: dict[str, list[float]] = {"whole": [], "decoding": [], "beside a re-run": []}
        kinds: list[str] = []

        def schedule(*args: Any, **kwargs: Any) -> Any:
            output = self._inner_schedule(*args, **kwargs)
            names = output.num_scheduled_tokens
            is_rerun = any("shadow" in name for name in names)
            is_decoding = all(count == 1 or "shadow" in name for name, count in names.items())
            if not is_decoding or not names or (is_rerun and len(names) == 1):
                kinds.append("")
            else:
                kinds.append("beside a re-run" if is_rerun else "decoding")
            return output

        self._scheduler.schedule = schedule
        numbers = random.Random(seed)
        left = [numbers.choices(range(self._vocabulary), k=length) for _ in range(requests)]
        params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False)
        engine = self._llm.llm_engine
        began = time.process_time()
        while left or engine.has_unfinished_requests() or self._scheduler.has_requests():
            # A new one as soon as one is answered, but for moments in between, as users leave them.
            if left and self._scheduler.get_request_counts() == (0, 0):
                for prompt in left[:AT_ONCE]:
                    engine.add_request(str(len(left)), {"prompt_token_ids": prompt}, params)
                    left.pop(0)
            step = time.process_time()
            engine.step()
            if kinds and kinds[-1]:
                told[kinds[-1]].append(time.process_time() - step)
            kinds.clear()
        told["whole"].append(time.process_time() - began)
        return told


def main() -> None:
    """Print what one request costs in each way, then everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a folder or hub name, as for vLLM")
    parser.add_argument("--ratio", type=float, default=0.3, help="OrthoRank's")
    parser.add_argument("--requests", type=int, default=24, help="in one run")
    parser.add_argument("--length", type=int, default=512, help="of their prompts")
    parser.add_argument("--pairs", type=int, default=3, help="of runs")
    arguments = parser.parse_args()
    use_one_process()
    engine = Engine(arguments.model, arguments.ratio)
    all_told: dict[float, dict[str, list[float]]] = {0.0: {}, 1.0: {}}
    for pair in range(-1, arguments.pairs):
        for share in (0.0, 1.0) if pair % 2 else (1.0, 0.0):
            requests = arguments.requests if pair >= 0 else AT_ONCE
            for name, values in engine.serve(share, requests, arguments.length, pair).items():
                # The first pair warms up.
                if pair >= 0:
                    all_told[share].setdefault(name, []).extend(values)
    result: dict[str, Any] = {
        f"share {share:g}": {
            name: {"median": statistics.median(values), "number": len(values)}
            for name, values in told.items()
            if values
        }
        for share, told in all_told.items()
    }
    without, with_all = (
        result[f"share {share}"]["whole"]["median"] / arguments.requests for share in (0, 1)
    )
    result["milliseconds of a request"] = {"without": 1e3 * without, "with": 1e3 * with_all}
    print(
        f"a request of {arguments.length} tokens: {1e3 * without:.0f} ms of processor time, "
        f"{1e3 * with_all:.0f} ms with a re-run of each, and so {with_all / without - 1:.1%} more; "
        f"with one of a hundred {(with_all / without - 1) / 100:.2%}"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
