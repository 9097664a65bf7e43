"""How fast: stock vLLM and OrthoRank as servers run them, each in a process of its own, in turn."""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orthorank_vllm.attention.backend import choose_backend
from orthorank_vllm.device_check.findings import Speed

RATIO = 0.3
STOCK = "stock"
LENGTHS = (2048, 8192, 32768)
BATCHES = (1, 64)
# Prompt tokens of one measurement, whatever the length of a prompt.
TOKENS = 32768
DECODE_PROMPT, DECODED = 32, 128
ROUNDS, LEAST_ROUNDS = 5, 3


def use_way(worker: Any, asked: str) -> None:
    """In a worker: how the selective layers attend from now on."""
    orthorank = worker.get_model().orthorank
    layers = [layer.attn.attn for layer in orthorank._decoder.layers.values()]
    orthorank.attention = choose_backend(asked, layers, layers[0].kv_cache.device.type)


class Contest:
    """Both engines on one device.

    Args:
        ways: of OrthoRank to attend.
        options: vLLM's, for both.
    """

    def __init__(
        self,
        folder: Path,
        lengths: Sequence[int],
        ways: Sequence[str],
        deadline: float,
        **options: Any,
    ) -> None:
        from vllm import LLM

        self._ways = list(ways)
        self._deadline = deadline
        self._random = random.Random(0)
        common = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "max_model_len": max(lengths) + DECODED,
            **options,
        }
        orthorank = {"ratio": RATIO, "calibrate_seconds": 0}
        self._ours = LLM(str(folder), **common, additional_config={"orthorank": orthorank})
        self._stock = LLM(str(folder), **common)
        config = self._stock.llm_engine.vllm_config.model_config.hf_text_config
        self._vocabulary = int(config.vocab_size)

    def prefill(self, length: int, tokens: int = TOKENS) -> Speed:
        """Prompts of one length, at once, to their first tokens."""
        count = max(tokens // length, 1)
        return self._measure(
            f"prefill, {count} x {length} tokens", count, length, 1, count * length
        )

    def decode(self, batch: int) -> Speed:
        """Short prompts, many tokens each."""
        work = f"decode, batch {batch}"
        return self._measure(work, batch, DECODE_PROMPT, DECODED, batch * DECODED)

    def _measure(self, work: str, count: int, length: int, outputs: int, tokens: int) -> Speed:
        runs: dict[str, Callable[[list[list[int]]], float]] = {
            STOCK: lambda prompts: self._seconds(self._stock, prompts, outputs),
            **{way: self._run_of(way, outputs) for way in self._ways},
        }
        for run in runs.values():
            run(self._prompts(count, length))
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(ROUNDS):
            if number >= LEAST_ROUNDS and time.monotonic() > self._deadline:
                break
            prompts = self._prompts(count, length)
            for name in list(runs) if number % 2 == 0 else reversed(list(runs)):
                seconds[name].append(runs[name](prompts))
        return Speed(work, tokens, seconds)

    def _run_of(self, way: str, outputs: int) -> Callable[[list[list[int]]], float]:
        def run(prompts: list[list[int]]) -> float:
            self._ours.collective_rpc(use_way, args=(way,))
            return self._seconds(self._ours, prompts, outputs)

        return run

    def _seconds(self, llm: Any, prompts: list[list[int]], outputs: int) -> float:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=outputs, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return time.perf_counter() - start

    def _prompts(self, count: int, length: int) -> list[list[int]]:
        return [
            [self._random.randrange(self._vocabulary) for _ in range(length)] for _ in range(count)
        ]
