"""A small model in vLLM's engine: its ways to attend against each other and against stock's.

The engine runs in this process, so that its attention can be watched.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from orthorank_vllm.attention.backend import AttentionBackend, AttentionPlan
from orthorank_vllm.attention.kv_cache import write_kv
from orthorank_vllm.metrics.collector import orthorank_metrics
from orthorank_vllm.metrics.status import engines_of
from orthorank_vllm.selection.plan import Batch, Ints
from tests.support.random_models import SELECTIVE, SMALL, TAIL

# Prompts: of one token, within a window, over several chunks.
LENGTHS = (1, 2, 100, 129, 700, 3000)
CHUNK = 1024
GENERATED = 8
# The way of each device that is not vLLM's own attention.
OURS = {"cpu": "cpu", "cuda": "triton"}


class Compared:
    """Two ways for the same queries; the second one's output is used."""

    def __init__(
        self, first: AttentionPlan, second: AttentionPlan, found: list[torch.Tensor]
    ) -> None:
        """
        Args:
            found: gets the largest difference of each call, as a share of the largest output.
        """
        self._first = first
        self._second = second
        self._found = found

    write = staticmethod(write_kv)

    def run(
        self,
        attn: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """See `AttentionPlan`."""
        first = self._first.run(attn, query, key, value, rows, positions).float()
        second = self._second.run(attn, query, key, value, rows, positions)
        difference = (first - second.float()).abs().max()
        self._found.append(difference / second.float().abs().max().clamp(min=1e-6))
        return second


class SmallModel:
    """One engine with one of `random_models`."""

    def __init__(self, folder: str, device: str, dtype: str, **options: Any) -> None:
        """
        Args:
            device: of torch, by its type.
            options: vLLM's.
        """
        from vllm import LLM

        self._llm = LLM(
            folder,
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=4096,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=16,
            # Not of all requests together: a later one finds the pages of an earlier one.
            enable_prefix_caching=True,
            additional_config={"orthorank": {"layers": SELECTIVE, "tail": TAIL, "min_prompt": 0}},
            **options,
        )
        core: Any = self._llm.llm_engine.engine_core
        worker = core.engine_core.model_executor.driver_worker.worker
        self.orthorank = worker.model_runner.get_model().orthorank
        self.gather = self._way("gather")
        self.ours = self._way(OURS[device])
        self._random = random.Random(0)

    def prompts(self, lengths: Sequence[int]) -> list[list[int]]:
        """Random tokens, never the same twice."""
        return [
            [self._random.randrange(3, SMALL["vocab_size"]) for _ in range(length)]
            for length in lengths
        ]

    def serve(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Any]:
        """vLLM's outputs: some tokens of each, prompts in the prefix cache where they are known.

        Args:
            options: vLLM's `SamplingParams`.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=GENERATED, ignore_eos=True, detokenize=False, **options
        )
        inputs: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return self._llm.generate(inputs, params, use_tqdm=False)

    def log_probs(self, prompts: Sequence[Sequence[int]], way: AttentionBackend) -> torch.Tensor:
        """Of every token of the prompts but their first, in one row; nothing from the cache."""
        self.orthorank.attention = way
        self._llm.reset_prefix_cache()
        outputs = self.serve(prompts, prompt_logprobs=0)
        return torch.tensor(
            [
                entries[token].logprob
                for prompt, output in zip(prompts, outputs, strict=True)
                for token, entries in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
            ]
        )

    def _way(self, asked: str) -> AttentionBackend:
        self.orthorank.attend_by(asked)
        way: AttentionBackend = self.orthorank.attention
        return way


def attention_differences(model: SmallModel) -> list[float]:
    """Our way against vLLM's own, in every call over chunks, decoding and cached pages."""
    found: list[torch.Tensor] = []

    def both(batch: Batch, rows: Ints | None) -> AttentionPlan:
        stock = model.gather.plan(batch, rows)
        return stock if rows is None else Compared(model.ours.plan(batch, rows), stock, found)

    model.orthorank.attention = AttentionBackend("both", both)
    prompts = model.prompts(LENGTHS)
    model.serve(prompts)
    model.serve([prompt[:640] + model.prompts([300])[0] for prompt in prompts])
    return torch.stack(found).tolist()


def ratio_difference(model: SmallModel) -> float:
    """The share of updates that the counters say was skipped, against the configured ratio."""
    model.orthorank.attention = model.gather
    [before] = engines_of(orthorank_metrics())
    model.serve(model.prompts([3000, 2900]))
    [after] = engines_of(orthorank_metrics())
    skipped = after.token_updates_skipped - before.token_updates_skipped
    updates = after.token_updates - before.token_updates
    return abs(skipped / (updates + skipped) - float(model.orthorank.config.ratio))


def forward_differences(model: SmallModel) -> dict[str, float]:
    """Mean differences of the prompts' log-probabilities.

    Returns:
        `dense`: our forward without a selective layer, against stock; `ways`: with them, our way
        to attend against vLLM's own; `sparse`: with them, against stock.
    """
    orthorank = model.orthorank
    prompts = model.prompts(LENGTHS[1:])
    gathered, ours = (model.log_probs(prompts, way) for way in (model.gather, model.ours))
    orthorank.is_paused = True
    stock = model.log_probs(prompts, model.gather)
    orthorank.is_paused = False
    selective, orthorank._selective = orthorank._selective, {}
    dense = model.log_probs(prompts, model.gather)
    orthorank._selective = selective
    pairs = {"dense": (dense, stock), "ways": (ours, gathered), "sparse": (gathered, stock)}
    return {name: float((one - other).abs().mean()) for name, (one, other) in pairs.items()}


def first_wait(model: SmallModel) -> str:
    """Where the host waits for the GPU between a step's numbers and its counts; empty: nowhere."""
    model.orthorank.attention = model.ours
    model.serve(model.prompts(LENGTHS))
    for name in ("plan", "forward", "count"):
        setattr(model.orthorank, name, _without_waiting(getattr(model.orthorank, name)))
    try:
        model.serve(model.prompts(LENGTHS))
    except RuntimeError as error:
        return str(error)
    return ""


def _without_waiting(function: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watched


def compare(folder: str, device: str, dtype: str, **options: Any) -> dict[str, Any]:
    """All of the above that the device and the kind of KV cache allow.

    Args:
        options: vLLM's.
    """
    model = SmallModel(folder, device, dtype, **options)
    found: dict[str, Any] = {
        "attention": attention_differences(model),
        "ratio": ratio_difference(model),
    }
    if options.get("kv_cache_dtype") != "fp8":
        found |= forward_differences(model)
    if device == "cuda":
        found["wait"] = first_wait(model)
    return found
