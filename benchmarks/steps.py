"""Time vLLM's steps with and without OrthoRank in turn, in one engine.

    python benchmarks/steps.py MODEL [--lengths 128,512,2048] [--pairs 20] [--layers 7:1/3,26:0]
    python benchmarks/steps.py --shapes llama-3-8b --tokens 32768 --attention gather,triton

Two engines of the same vLLM differ by more than what is looked for here: what memory each happens
to get decides. So this is one engine, whose prompts take stock vLLM's forward and the sparse one in
turn. It prints what the prompts take either way, what planning and selecting take of it, and what
a step of decoding pays for the plugin. The last line is all of it as JSON.

On a CPU the time is the forward's alone. On a GPU, where the host does not wait for it, it is that
of the whole work, decoding is compared as prefill is, and plan and selection are the host's part.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orthorank_vllm.bench.servers import use_one_process

RATIO = 0.3
BATCHES = (1, 8, 64)
DECODED = 64
DECODE_PROMPT = 32
WARM_UPS = 2
# Configurations of models, to be run with random weights: a speed does not depend on their values.
# The context may be longer than the model's own.
SHAPES = {path.stem: path for path in Path(__file__).parent.glob("*.json")}


@dataclass
class Step:
    """Seconds of one step; on a GPU, of all steps of some prompts.

    Attributes:
        all: from before the plugin's hook until after it; on a GPU until the answers are there.
        model: the model's forward.
        plan, selection: parts of these two.
    """

    all: float = 0.0
    model: float = 0.0
    plan: float = 0.0
    selection: float = 0.0

    @classmethod
    def sum(cls, steps: Sequence[Step]) -> Step:
        """Of all their parts."""
        return cls(*(sum(part) for part in zip(*(vars(s).values() for s in steps), strict=True)))


@dataclass(frozen=True)
class Comparison:
    """The same work by stock's forward and by the sparse one.

    Attributes:
        stock, sparse, plan, selection: median seconds.
        times_as_fast: quartiles of the paired ratios.
    """

    work: str
    stock: float
    sparse: float
    times_as_fast: list[float]
    plan: float
    selection: float

    HEAD = "| work | stock | sparse | times as fast | quartiles | plan | selection | share |"

    def __str__(self) -> str:
        low, median, high = self.times_as_fast
        return (
            f"| {self.work} | {1e3 * self.stock:.1f} ms | {1e3 * self.sparse:.1f} ms "
            f"| {median:.3f} | {low:.3f} to {high:.3f} "
            f"| {1e3 * self.plan:.2f} ms | {1e3 * self.selection:.2f} ms "
            f"| {(self.plan + self.selection) / self.sparse:.1%} |"
        )


@dataclass(frozen=True)
class Decoding:
    """A step of decoding, and the part of it outside the model's forward; median seconds."""

    batch: int
    step: float
    plugin: float

    HEAD = "| decoding at once | step | the plugin's part | share |"

    def __str__(self) -> str:
        step, plugin = f"{1e3 * self.step:.1f} ms", f"{1e6 * self.plugin:.0f} µs"
        return f"| {self.batch} | {step} | {plugin} | {self.plugin / self.step:.2%} |"


def head(titles: str) -> str:
    """A table's first two lines."""
    return f"{titles}\n|{'---|' * (titles.count('|') - 1)}"


@dataclass
class Engine:
    """vLLM with clocks around the parts of its steps."""

    llm: Any
    is_gpu: bool
    device: str
    lora: Any = None
    _numbers: random.Random = field(default_factory=lambda: random.Random(0))
    _steps: list[Step] = field(default_factory=lambda: [Step()])

    def __post_init__(self) -> None:
        """Put the clocks in place, for the rest of this process."""
        from orthorank_vllm.selection.topk import SegmentedTopK

        runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        model = runner.get_model()
        self.orthorank = model.orthorank
        self.orthorank.plan = self._timed(self.orthorank.plan, "plan")
        kinds: list[Any] = [SegmentedTopK]
        if self.is_gpu:
            from orthorank_vllm.selection.topk_triton import SegmentedTopKTriton

            kinds.append(SegmentedTopKTriton)
        for kind in kinds:
            kind.rows = self._timed(kind.rows, "selection")
            kind.rows_by_error = self._timed(kind.rows_by_error, "selection")
        if not self.is_gpu:
            model.forward = self._timed(model.forward, "model")
            forward = self._timed(runner._model_forward, "all")

            def step(*args: Any, **kwargs: Any) -> Any:
                self._steps.append(Step())
                return forward(*args, **kwargs)

            runner._model_forward = step

    def draw(self, count: int, length: int) -> list[list[int]]:
        """Prompts of random tokens."""
        vocabulary = range(self.llm.llm_engine.vllm_config.model_config.get_vocab_size())
        return [self._numbers.choices(vocabulary, k=length) for _ in range(count)]

    def generate(self, prompts: list[list[int]], outputs: int) -> list[Step]:
        """The steps that it took; on a GPU all in one."""
        from vllm import SamplingParams

        self._steps = [Step()] if self.is_gpu else []
        params = SamplingParams(
            temperature=0, max_tokens=outputs, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        started = time.perf_counter()
        self.llm.generate(inputs, params, use_tqdm=False, lora_request=self.lora)
        if self.is_gpu:
            self._steps[0].all = time.perf_counter() - started
        return self._steps

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            step = self._steps[-1]
            setattr(step, part, getattr(step, part) + time.perf_counter() - started)
            return result

        return timed


def compare(
    engine: Engine, count: int, length: int, outputs: int, ways: list[str], pairs: int
) -> Iterator[Comparison]:
    """Stock's forward and the sparse one by each way, in turn, on so many prompts at once."""
    work = f"{count} x {length} tokens" if count > 1 else f"{length} tokens"
    if outputs > 1:
        work += f", {outputs} decoded"
    paths = (None, *ways)
    found: dict[str | None, list[Step]] = {path: [] for path in paths}
    for number in range(WARM_UPS + pairs):
        drawn = engine.draw(count, length)
        for path in paths if number % 2 else reversed(paths):
            engine.orthorank.is_paused = path is None
            if path is not None and len(ways) > 1:
                engine.orthorank.attend_by(path)
            found[path].append(Step.sum(engine.generate(drawn, outputs)))
    stock = found[None][WARM_UPS:]
    for way in ways:
        sparse = found[way][WARM_UPS:]
        ratios = [theirs.all / ours.all for theirs, ours in zip(stock, sparse, strict=True)]
        yield Comparison(
            f"{work}, {way}" if len(ways) > 1 else work,
            statistics.median(step.all for step in stock),
            statistics.median(step.all for step in sparse),
            statistics.quantiles(ratios, n=4, method="inclusive"),
            statistics.median(step.plan for step in sparse),
            statistics.median(step.selection for step in sparse),
        )


def time_decoding(engine: Engine, batch: int, runs: int) -> Decoding:
    """The clocks' answer, on a CPU."""
    engine.orthorank.is_paused = False
    steps = []
    for _ in range(runs):
        taken = engine.generate(engine.draw(batch, DECODE_PROMPT), DECODED)
        steps += [step for step in taken if not step.plan]
    return Decoding(
        batch,
        step=statistics.median(step.all for step in steps),
        plugin=statistics.median(step.all - step.model for step in steps),
    )


def start(arguments: argparse.Namespace, lengths: list[int], folder: str) -> Engine:
    """An engine for prompts of these lengths.

    Args:
        folder: for the configuration, where shapes are asked for.
    """
    from vllm import LLM
    from vllm.platforms import current_platform

    chosen = {"layers": arguments.layers} if arguments.layers else {"ratio": arguments.ratio}
    chosen |= {"attention": arguments.attention[0], "stand_in": arguments.stand_in}
    is_gpu = current_platform.device_type == "cuda"
    room = max(*lengths, DECODE_PROMPT) + DECODED
    # On a GPU vLLM's defaults; on a CPU one step for each prompt.
    on_cpu = {"dtype": "float32", "max_num_batched_tokens": max(room, 2048)}
    options: dict[str, Any] = {} if is_gpu else on_cpu
    lora = None
    if arguments.lora:
        from vllm.lora.request import LoRARequest

        lora = LoRARequest("adapter", 1, arguments.lora)
        options |= {"enable_lora": True, "max_loras": arguments.max_loras, "max_lora_rank": 16}
    if arguments.shapes:
        shutil.copy(SHAPES[arguments.shapes], Path(folder) / "config.json")
        arguments.model, arguments.load_format = folder, "dummy"
    return Engine(
        LLM(
            arguments.model,
            load_format=arguments.load_format,
            skip_tokenizer_init=True,
            max_model_len=room,
            enable_prefix_caching=False,
            additional_config={"orthorank": chosen},
            **options,
        ),
        is_gpu,
        current_platform.get_device_name(),
        lora,
    )


def main() -> None:
    """Print the tables as they grow, then everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="a folder or hub name, as for vLLM")
    parser.add_argument("--shapes", choices=SHAPES, help="in place of a model, with random weights")
    parser.add_argument("--load-format", default="auto", help="vLLM's; dummy: random weights")
    parser.add_argument("--layers", help="OrthoRank's; without, what it takes at --ratio")
    parser.add_argument("--ratio", default=RATIO, help="OrthoRank's (default: %(default)s)")
    parser.add_argument("--stand-in", default="auto", help="OrthoRank's (default: %(default)s)")
    parser.add_argument("--lengths", default="128,512,2048", help="of prompts, in tokens")
    parser.add_argument("--pairs", type=int, default=20, help="of forwards, at each length")
    parser.add_argument("--tokens", type=int, default=0, help="at once, in as many prompts as fit")
    parser.add_argument("--attention", default="auto", help="OrthoRank's, one or more of them")
    parser.add_argument("--lora", help="folder of an adapter that all prompts have")
    parser.add_argument("--max-loras", type=int, default=1, help="vLLM's (default: %(default)s)")
    arguments = parser.parse_args()
    if bool(arguments.model) == bool(arguments.shapes):
        parser.error("give either a model or --shapes")
    lengths = [int(length) for length in arguments.lengths.split(",")]
    arguments.attention = arguments.attention.split(",")
    use_one_process()
    with tempfile.TemporaryDirectory() as folder:
        engine = start(arguments, lengths, folder)
    results: dict[str, Any] = {
        "model": arguments.shapes or arguments.model,
        "device": engine.device,
        "ratio": float(engine.orthorank.config.ratio),
        "prompts": [],
        "decoding": [],
    }
    ways, pairs = arguments.attention, arguments.pairs
    prompts = [(max(arguments.tokens // length, 1), length, 1) for length in lengths]
    if engine.is_gpu:
        prompts += [(batch, DECODE_PROMPT, DECODED) for batch in BATCHES]
    print(head(Comparison.HEAD))
    for work in prompts:
        for comparison in compare(engine, *work, ways, pairs):
            results["prompts"].append(asdict(comparison))
            print(comparison, flush=True)
    if not engine.is_gpu:
        print("\n" + head(Decoding.HEAD))
        for batch in BATCHES:
            decoding = time_decoding(engine, batch, max(pairs // 4, 1))
            results["decoding"].append(asdict(decoding))
            print(decoding, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
