"""A whole small model in vLLM's engine: the ways to attend against each other, and against stock.

The engine runs in this process, so that its attention can be watched.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from orthorank_vllm.attention.backend import AttentionBackend, AttentionPlan, choose_backend
from orthorank_vllm.attention.kv_cache import write_kv
from orthorank_vllm.device_check.findings import Finding
from orthorank_vllm.device_check.shapes import SELECTIVE, SMALL
from orthorank_vllm.selection.plan import Batch, Ints, Plan

# Of the largest value that attention gives. With K and V in 8 bits the stock kernel rounds Q to
# 8 bits as well, and ours does not.
ATTENTION_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.02, "fp8": 0.15}
# Of a log-probability, on average.
LOGPROB_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.05, "fp8": 0.1}
# Prompts: of one token, within a window, over several chunks.
LENGTHS = (1, 2, 100, 129, 700, 3000)
CHUNK = 1024
GENERATED = 8


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
    """One engine with a small model."""

    def __init__(self, folder: str, device: str, dtype: str, **options: Any) -> None:
        """
        Args:
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
            additional_config={"orthorank": {"layers": SELECTIVE}},
            **options,
        )
        core: Any = self._llm.llm_engine.engine_core
        worker = core.engine_core.model_executor.driver_worker.worker
        self.orthorank = worker.model_runner.get_model().orthorank
        layers = [layer.attn.attn for layer in self.orthorank._decoder.layers.values()]
        ours = "cpu" if device == "cpu" else "triton"
        self.gather = choose_backend("gather", layers, device)
        self.ours = choose_backend(ours, layers, device)
        self._random = random.Random(0)

    def prompts(self, lengths: Sequence[int]) -> list[list[int]]:
        """Random tokens, never the same twice."""
        return [
            [self._random.randrange(3, SMALL["vocab_size"]) for _ in range(length)]
            for length in lengths
        ]

    def log_probs(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Of every token of the prompts but their first, in one row."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0,
            max_tokens=GENERATED,
            ignore_eos=True,
            prompt_logprobs=0,
            detokenize=False,
        )
        inputs: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        return torch.tensor(
            [
                entries[token].logprob
                for prompt, output in zip(prompts, outputs, strict=True)
                for token, entries in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
            ]
        )

    def serve(self, prompts: Sequence[Sequence[int]]) -> None:
        """Generate some tokens, with prompts in the prefix cache where they are known."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=GENERATED, ignore_eos=True, detokenize=False
        )
        inputs: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        self._llm.generate(inputs, params, use_tqdm=False)

    def forget_prompts(self) -> None:
        self._llm.reset_prefix_cache()


def check_model(folder: str, device: str, dtype: str, **options: Any) -> Iterator[Finding]:
    """
    Args:
        device: of torch, by its type.
        options: vLLM's.
    """
    model = SmallModel(folder, device, dtype, **options)
    kind = "fp8" if options.get("kv_cache_dtype") == "fp8" else dtype
    yield _ways_agree(model, kind)
    yield _counts(model)
    if kind != "fp8":
        yield from _forwards_agree(model, kind)
    if device == "cuda":
        yield _never_waits(model)


def _ways_agree(model: SmallModel, kind: str) -> Finding:
    """Every call of the selective layers and of the last, over chunks, decoding, cached pages."""
    found: list[torch.Tensor] = []

    def both(batch: Batch, rows: Ints | None) -> AttentionPlan:
        stock = model.gather.plan(batch, rows)
        return stock if rows is None else Compared(model.ours.plan(batch, rows), stock, found)

    model.orthorank.attention = AttentionBackend("both", both)
    prompts = model.prompts(LENGTHS)
    model.serve(prompts)
    model.serve([prompt[:640] + model.prompts([300])[0] for prompt in prompts])
    worst = float(torch.stack(found).max())
    what = f"{model.ours.description} against gather, {len(found)} calls: largest difference"
    return Finding(what, worst, ATTENTION_TOLERANCES[kind])


def _counts(model: SmallModel) -> Finding:
    """The share of the updates that the counters say was skipped, against the configured one."""
    counted: list[tuple[int, int]] = []
    model.orthorank.attention = model.gather
    metrics = model.orthorank._counter.metrics
    stock = metrics.count_updates

    def count_updates(prompt_tokens: int, skipped: Mapping[int, int]) -> None:
        counted.append((prompt_tokens, sum(skipped.values())))

    metrics.count_updates = count_updates
    model.serve(model.prompts([3000, 2900]))
    metrics.count_updates = stock
    prompt_tokens, skipped = (sum(column) for column in zip(*counted, strict=True))
    total = prompt_tokens * model.orthorank.config.num_layers
    difference = abs(skipped / total - model.orthorank.config.ratio)
    return Finding("ratio counted against the configured one", difference, 0.02)


def _forwards_agree(model: SmallModel, kind: str) -> list[Finding]:
    """The sparse forward without a selective layer against stock; and with them, by both ways."""
    orthorank = model.orthorank
    config, plan = orthorank.config, orthorank.plan
    prompts = model.prompts(LENGTHS[1:])

    def by(way: AttentionBackend) -> torch.Tensor:
        orthorank.attention = way
        model.forget_prompts()
        return model.log_probs(prompts)

    gathered, ours = by(model.gather), by(model.ours)
    orthorank.plan = lambda batch: None
    stock = by(model.gather)
    orthorank.plan = plan
    orthorank.use_layers(config.with_layers((), "the check of this device"))
    dense = by(model.gather)
    orthorank.use_layers(config)
    return [
        Finding(
            "log-probabilities, all layers dense in our forward against stock: mean difference",
            float((dense - stock).abs().mean()),
            LOGPROB_TOLERANCES[kind],
        ),
        # Float noise changes which tokens win where two scores are close, so no bound is right.
        Finding(
            f"log-probabilities, {model.ours.description} against gather: mean difference",
            float((ours - gathered).abs().mean()),
        ),
        Finding(
            "log-probabilities, sparse against stock: mean difference",
            float((gathered - stock).abs().mean()),
        ),
    ]


def _never_waits(model: SmallModel) -> Finding:
    """Whether the host waits for the device anywhere between a step's numbers and its counts."""
    orthorank = model.orthorank
    orthorank.attention = model.ours
    model.serve(model.prompts(LENGTHS))
    for name in ("plan", "forward", "count"):
        setattr(orthorank, name, _without_waiting(getattr(orthorank, name)))
    what = "sparse forward under torch.cuda.set_sync_debug_mode('error')"
    try:
        model.serve(model.prompts(LENGTHS))
    except RuntimeError as error:
        return Finding(f"{what}: {str(error).splitlines()[0]}", 1, 0)
    return Finding(what, 0, 0)


def _without_waiting(function: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*args: Any) -> Plan | torch.Tensor | None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            result: Plan | torch.Tensor | None = function(*args)
            return result
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watched
