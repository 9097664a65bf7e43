"""What is timed, on which prompts, and how the times of two servers compare."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

from orthorank_vllm.bench.servers import Server, completion

WARM_UPS = 2
DECODE_PROMPT = 32
# vLLM's smallest usual cache block: prompts that differ in it share no cached prefix.
HEAD = 16
# A vLLM worker in a process of its own (as on a CPU) spins for 1 s after a request, on a
# core that the other server's request would then lack.
SETTLE_SECONDS = 1.2

Prompt = list[int]
Times = list[tuple[float, float]]


class UsageError(ValueError):
    """A user's mistake, told in one line."""


@dataclass
class Workload:
    """One row of the report: what is timed, on which prompts, and the times found."""

    name: str
    measure: Callable[[Server, Prompt], float]
    prompts: list[Prompt]
    tokens: int
    """Tokens that one measured time stands for."""
    noise: Times = field(default_factory=list)
    """Stock against itself."""
    times: Times = field(default_factory=list)
    """Stock against OrthoRank, in seconds."""


@dataclass(frozen=True)
class Spread:
    """Ratios of paired times: first divided by second, so above 1 the second is faster."""

    median: float
    low_quartile: float
    high_quartile: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, times: Times) -> "Spread":
        ratios = [first / second for first, second in times]
        # One pair is its own quartiles; `quantiles` wants two.
        points = ratios if len(ratios) > 1 else ratios * 2
        low, median, high = statistics.quantiles(points, n=4, method="inclusive")
        return cls(median, low, high, min(ratios), max(ratios))

    @classmethod
    def of_noise(cls, times: Times) -> "Spread":
        """Of a server against itself: which of the two times is first means nothing."""
        return cls.of([*times, *((second, first) for first, second in times)])

    def against(self, noise: "Spread") -> str:
        """A difference counts only if the middle half of the pairs lies outside all the noise."""
        if self.low_quartile > noise.maximum:
            return "**gain**"
        return "**loss**" if self.high_quartile < noise.minimum else "within noise"


def time_to_first_token(server: Server, prompt: Prompt) -> float:
    """Seconds from the request to the answer that holds the one token asked for."""
    start = time.perf_counter()
    with completion(server, {"prompt": prompt, "max_tokens": 1, "temperature": 0}) as answer:
        answer.read()
        return time.perf_counter() - start


def inter_token_latency(server: Server, prompt: Prompt, tokens: int) -> float:
    """Mean seconds between two streamed tokens, the wait for the first one left out."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
    chunks: list[tuple[float, bytes]] = []
    with completion(server, {**body, "ignore_eos": True, "stream": True}) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                chunks.append((time.perf_counter(), line))
    if len(chunks) < 2 or b'"choices"' not in chunks[-1][1]:
        raise server.failure(f"streamed {len(chunks)} chunks instead of {tokens} tokens")
    return (chunks[-1][0] - chunks[0][0]) / (tokens - 1)


def tokenise(model: str, file: str | None) -> Prompt:
    """The text that prompts are cut from; without a file, one that every Python carries.

    Raises:
        UsageError: the file or the model's tokenizer cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        text = "\n".join(topics.values()) if file is None else Path(file).read_text()
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UsageError(f"text or tokenizer: {' '.join(str(error).split())}") from None
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class Stretches:
    """Random stretches of one text, no two of which share a prefix that vLLM could cache."""

    def __init__(self, tokens: Prompt) -> None:
        self._tokens = tokens
        self._random = random.Random(0)
        self._heads: set[tuple[int, ...]] = set()

    def draw(self, length: int) -> Prompt:
        """
        Raises:
            UsageError: the text does not hold another stretch of this length.
        """
        for _ in range(1000 if len(self._tokens) >= length else 0):
            start = self._random.randrange(len(self._tokens) - length + 1)
            stretch = self._tokens[start : start + length]
            head = tuple(stretch[:HEAD])
            if head not in self._heads:
                self._heads.add(head)
                return stretch
        raise UsageError(
            f"the text has {len(self._tokens)} tokens: too few for this many different "
            f"prompts of {length}"
        )


def plan_workloads(
    model: str, text: str | None, lengths: Sequence[int], output_len: int, pairs: int
) -> list[Workload]:
    """All prompts, drawn before any server starts: mistakes show at once."""
    stretches = Stretches(tokenise(model, text))
    # Each noise pair needs two prompts, since one server would have the second in its cache.
    count = WARM_UPS + 3 * pairs

    def draw(length: int) -> list[Prompt]:
        return [stretches.draw(length) for _ in range(count)]

    def decode(server: Server, prompt: Prompt) -> float:
        return inter_token_latency(server, prompt, output_len)

    return [
        *(Workload(f"prefill {n}", time_to_first_token, draw(n), n) for n in lengths),
        Workload(f"decode {output_len}", decode, draw(DECODE_PROMPT), 1),
    ]


def warm_up(workloads: Sequence[Workload], servers: Sequence[Server]) -> None:
    """Both servers meet every shape, and so far the same prompts."""
    for workload in workloads:
        for _ in range(WARM_UPS):
            prompt = workload.prompts.pop()
            for server in servers:
                workload.measure(server, prompt)


def alternate(workload: Workload, pairs: int, first: Server, second: Server) -> Times:
    """Times in pairs, the order within a pair changing from one to the next."""
    found: Times = []
    for pair in range(pairs):
        prompt = workload.prompts.pop()
        other = workload.prompts.pop() if second is first else prompt
        jobs = [(0, first, prompt), (1, second, other)]
        seconds = [0.0, 0.0]
        for column, server, text in jobs if pair % 2 == 0 else reversed(jobs):
            time.sleep(SETTLE_SECONDS)
            seconds[column] = workload.measure(server, text)
        found.append((seconds[0], seconds[1]))
    return found
