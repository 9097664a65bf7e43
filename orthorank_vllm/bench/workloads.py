"""What is timed: the first token, requests under load, and the time between tokens."""

import itertools
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from orthorank_vllm.bench.servers import Server, completion
from orthorank_vllm.options import OptionError

REQUESTS_PER_CLIENT = 2
STREAMED_PROMPT = 32
STREAMED_TOKENS = 64
# vLLM's smallest usual cache block: prompts that differ in it share no cached prefix.
HEAD = 16

Prompt = list[int]


class Prompts:
    """Random stretches of one text, no two of which begin in the same way."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._random = random.Random(0)
        self._heads: set[tuple[int, ...]] = set()

    def draw(self, length: int) -> Prompt:
        """A prompt of `length` tokens that begins as none before it.

        Raises:
            OptionError: the text does not hold another stretch of this length.
        """
        for _ in range(1000 if len(self._tokens) >= length else 0):
            start = self._random.randrange(len(self._tokens) - length + 1)
            stretch = list(self._tokens[start : start + length])
            head = tuple(stretch[:HEAD])
            if head not in self._heads:
                self._heads.add(head)
                return stretch
        raise OptionError(
            f"--data: the text has {len(self._tokens)} tokens, too few for this many different "
            f"prompts of {length}; give a longer one"
        )


@dataclass(frozen=True)
class Workload:
    """One row of the report. Everything is of one measurement.

    Attributes:
        requests: sent by `clients` at a time.
        outputs: tokens that each generates.
    """

    name: str
    clients: int
    requests: int
    prompt_len: int
    outputs: int
    streamed: bool = False

    @property
    def is_first_token(self) -> bool:
        return self.outputs == 1 and self.clients == 1

    def draw(self, prompts: Prompts) -> list[Prompt]:
        """The prompts of one measurement."""
        return [prompts.draw(self.prompt_len) for _ in range(self.requests)]

    def measure(self, server: Server, prompts: Sequence[Prompt]) -> float:
        """Seconds until all is answered, or between two tokens where that is streamed."""
        with ThreadPoolExecutor(self.clients) as clients:
            start = time.perf_counter()
            answers = list(clients.map(lambda prompt: self._ask(server, prompt), prompts))
            seconds = time.perf_counter() - start
        return sum(answers) / len(answers) if self.streamed else seconds

    def describe(self, seconds: float) -> str:
        """A time of this workload, in the unit that people know."""
        if self.streamed:
            return f"{seconds * 1e3:.1f} ms"
        if self.is_first_token:
            return f"{seconds * 1e3:.0f} ms, {self.prompt_len / seconds:,.0f} tokens/s"
        return f"{self.requests / seconds:.2f} requests/s"

    def _ask(self, server: Server, prompt: Prompt) -> float:
        body = {"prompt": prompt, "max_tokens": self.outputs, "temperature": 0, "ignore_eos": True}
        if not self.streamed:
            with completion(server, body) as answer:
                answer.read()
            return 0.0
        times = []
        with completion(server, {**body, "stream": True}) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    times.append(time.perf_counter())
        if len(times) < 2:
            raise server.failure(f"streamed {len(times)} chunks instead of {self.outputs} tokens")
        return between_tokens(times)


def between_tokens(times: Sequence[float]) -> float:
    """Seconds from one token of a stream to the next.

    The median, as in vLLM's own benchmark: the mean is decided by the few tokens at which the
    machine was busy with something else.

    Args:
        times: at which each token came, two or more.
    """
    return statistics.median(later - sooner for sooner, later in itertools.pairwise(times))


def plan_workloads(
    lengths: Sequence[int], clients: Sequence[int], output_len: int
) -> list[Workload]:
    """The rows of the report."""
    rows = []
    for count in clients:
        for length in lengths:
            if count == 1:
                rows.append(Workload(f"first token, {length} tokens", 1, 1, length, outputs=1))
            else:
                name = f"{count} clients, {length} in, {output_len} out"
                requests = count * REQUESTS_PER_CLIENT
                rows.append(Workload(name, count, requests, length, output_len))
        name = "between tokens" if count == 1 else f"between tokens, {count} clients"
        rows.append(Workload(name, count, count, STREAMED_PROMPT, STREAMED_TOKENS, streamed=True))
    return rows
