"""Load a running server with a mix of everything for a while, and check that nothing is left of it.

    python tools/soak.py http://127.0.0.1:8000 [--seconds 600] [--clients 8] [--pid PID]

Bursts, prompts of one token and the longest, new ones and ones that begin alike, ratios that change
(up to --max-ratio), streams, clients that go away amid a prompt and amid an answer. Then: no error,
the server healthy and idle, its private memory flat (--pid, of a server on this machine; the last
third of the time is compared with the one before it), and each greedy answer the same as of the
same request alone, where the server is aligned. An answer that differs where two tokens are equally
likely is told apart. The last line is all of it as JSON; the exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import statistics
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOLERANCE = 1e-3
# In every vocabulary.
TOKENS = range(10, 250)
LONGEST_ANSWER = 24
# Clients that wait for so long report an error.
PATIENCE = 300.0
# Of private memory, where a server answers as before.
MOST_GROWTH_MB = 32.0
UNANSWERED = (OSError, http.client.HTTPException, ValueError)
KINDS = {"whole": 10, "stream": 4, "gone amid its prompt": 2, "gone amid its answer": 2}


@dataclass(frozen=True)
class Ask:
    """One request; None as its ratio asks for none."""

    prompt: tuple[int, ...]
    max_tokens: int
    ratio: float | None


@dataclass(frozen=True)
class Answer:
    """Its tokens, and the log-probabilities of the likeliest two at each place."""

    tokens: list[str]
    likeliest: list[dict[str, float]]

    @classmethod
    def of(cls, choices: list[dict[str, Any]]) -> Answer:
        told = [choice["logprobs"] for choice in choices if choice.get("logprobs")]
        return cls(
            [token for each in told for token in each["tokens"]],
            [likeliest for each in told for likeliest in each["top_logprobs"]],
        )

    def difference(self, other: Answer) -> tuple[float, bool]:
        """The largest of a log-probability, and whether it ended at two that are equally likely."""
        worst = 0.0
        if len(self.tokens) != len(other.tokens):
            return float("inf"), False
        for place, token in enumerate(self.tokens):
            ours, theirs = self.likeliest[place], other.likeliest[place]
            if token != other.tokens[place]:
                gap = abs(ours[token] - ours.get(other.tokens[place], float("-inf")))
                return (worst, True) if gap < 2 * TOLERANCE else (float("inf"), False)
            worst = max(worst, abs(ours[token] - theirs[token]))
        return worst, False


@dataclass
class Server:
    """A server under load, and what came of it."""

    url: str
    api_key: str | None = None
    answers: dict[Ask, Answer] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def open(self, method: str, path: str, body: Any = None) -> http.client.HTTPConnection:
        """A connection on which a request was sent."""
        parts = urllib.parse.urlsplit(self.url)
        if parts.hostname is None:
            raise ValueError("that is no URL")
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE)
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        text = None if body is None else json.dumps(body)
        connection.request(method, parts.path.rstrip("/") + path, text, headers)
        return connection

    def get(self, path: str) -> str:
        with closing(self.open("GET", path)) as connection:
            return _checked(connection).read().decode()

    def metric(self, name: str) -> float | None:
        """The sum over engines of one of the server's metrics; None if it has no such."""
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        return sum(map(float, found)) if found else None

    def body(self, model: str, ask: Ask, is_streamed: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": model,
            "prompt": list(ask.prompt),
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 2,
            "return_tokens_as_token_ids": True,
            "stream": is_streamed,
        }
        return body if ask.ratio is None else {**body, "vllm_xargs": {"orthorank_ratio": ask.ratio}}

    def serve(self, model: str, ask: Ask, kind: str, draw: random.Random) -> None:
        """Send one request in one of the ways, and note what came of it."""
        is_streamed = kind in ("stream", "gone amid its answer")
        try:
            body = self.body(model, ask, is_streamed)
            with closing(self.open("POST", "/v1/completions", body)) as connection:
                if kind == "gone amid its prompt":
                    time.sleep(draw.uniform(0, 0.2))
                elif kind == "gone amid its answer":
                    next(_chunks(_checked(connection)), None)
                elif is_streamed:
                    self._note(ask, Answer.of(list(_chunks(_checked(connection)))))
                else:
                    self._note(ask, Answer.of(json.loads(_checked(connection).read())["choices"]))
            self.done[kind] += 1
        except (*UNANSWERED, KeyError) as error:
            self.errors.append(f"{kind}, {len(ask.prompt)} tokens: {error!r}")

    def _note(self, ask: Ask, answer: Answer) -> None:
        if len(answer.tokens) != ask.max_tokens:
            raise ValueError(f"{len(answer.tokens)} tokens, not {ask.max_tokens}")
        self.answers[ask] = answer


def _checked(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
    response = connection.getresponse()
    if response.status != 200:
        raise ValueError(f"status {response.status}: {response.read(300)!r}")
    return response


def _chunks(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        if line.startswith(b"data: {"):
            told = json.loads(line[6:])
            if "choices" not in told:
                raise ValueError(f"in a stream: {told}")
            yield from told["choices"]


def drawn(draw: random.Random, beginnings: list[list[int]], longest: int, most: float) -> Ask:
    """A request: most prompts are short, some as long as can be, some of one token."""
    answer = draw.randrange(1, LONGEST_ANSWER)
    length = draw.choice([1, *[draw.randrange(2, longest // 3)] * 6, draw.randrange(2, longest)])
    length = longest - answer if draw.random() < 0.05 else min(length, longest - answer)
    prompt = draw.choices(TOKENS, k=length)
    if draw.random() < 0.5:
        beginning = draw.choice(beginnings)[: draw.randrange(1, longest)]
        prompt = (beginning + prompt)[:length]
    ratio = draw.choice([None, None, 0.0, round(most / 2, 3), most]) if most else None
    return Ask(tuple(prompt), answer, ratio)


def load(server: Server, model: str, longest: int, most: float, seconds: float, many: int) -> None:
    """Serve clients that each send one request after the other, and sometimes several at once."""
    beginnings = [random.Random(seed).choices(TOKENS, k=longest) for seed in range(6)]
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            asks = [drawn(draw, beginnings, longest, most)]
            if draw.random() < 0.1:
                asks += [drawn(draw, beginnings, longest, most) for _ in range(6)]
            kinds = draw.choices(list(KINDS), list(KINDS.values()), k=len(asks))
            sent = [
                threading.Thread(target=server.serve, args=(model, ask, kind, draw), daemon=True)
                for ask, kind in zip(asks, kinds, strict=True)
            ]
            for thread in sent:
                thread.start()
            for thread in sent:
                thread.join()
            time.sleep(draw.choice([0, 0, 0.05, 0.5]))

    clients = [threading.Thread(target=client, args=(number,)) for number in range(many)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()


def private_mb(pid: int) -> float:
    """Memory that a process and its children share with nobody."""
    total = 0
    with suppress(OSError):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total = sum(map(int, re.findall(r"^Private_\w+: +(\d+)", rollup, re.MULTILINE)))
    children: list[str] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            children += thread.read_text().split()
    return total / 1024 + sum(private_mb(int(child)) for child in children)


def watch(pid: int, samples: list[float], stop: threading.Event) -> None:
    """Take samples of the memory."""
    while not stop.wait(0.5):
        samples.append(private_mb(pid))


def compare(server: Server, model: str, most: int) -> dict[str, Any]:
    """Ask some of the requests again, one at a time."""
    draw = random.Random(0)
    asks = draw.sample(list(server.answers), min(most, len(server.answers)))
    worst, ties, wrong = 0.0, 0, 0
    for ask in asks:
        crowd = server.answers[ask]
        server.serve(model, ask, "whole", draw)
        difference, is_tie = crowd.difference(server.answers[ask])
        ties += is_tie
        wrong += difference > TOLERANCE
        worst = max(worst, difference)
    return {"compared": len(asks), "worst": worst, "ties": ties, "wrong": wrong}


def wait_until_idle(server: Server) -> bool:
    """Whether no request runs or waits and no block of the KV cache is held, within a minute."""
    busy = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"
    for _ in range(120):
        if not any(server.metric(name) for name in busy):
            return True
        time.sleep(0.5)
    return False


def soak(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the server, and check it."""
    told = json.loads(server.get("/v1/models"))["data"][0]
    model, longest = told["id"], told["max_model_len"]
    most = arguments.max_ratio
    if most is None:
        most = server.metric("orthorank_ratio_max") or 0.0
    samples: list[float] = []
    stop = threading.Event()
    if arguments.pid:
        threading.Thread(target=watch, args=(arguments.pid, samples, stop), daemon=True).start()
    load(server, model, longest, most, arguments.seconds, arguments.clients)
    stop.set()
    result: dict[str, Any] = {"requests": dict(server.done), "errors": server.errors[:20]}
    failed = ["requests failed"] if server.errors else []
    if arguments.pid and len(samples) < 6:
        failed.append("its memory was seen too seldom: load it for longer")
    elif samples:
        third = len(samples) // 3
        medians = [statistics.median(samples[part * third :][:third]) for part in range(3)]
        result["private_mb"] = medians
        if medians[2] - medians[1] > arguments.growth:
            failed.append(f"its private memory grew: {medians[1]:.0f} to {medians[2]:.0f} MB")
    try:
        failed += ask_afterwards(server, model, arguments.compare, result)
    except UNANSWERED as error:
        failed.append(f"it no longer answers ({error})")
    return {**result, "failed": failed}


def ask_afterwards(server: Server, model: str, most: int, result: dict[str, Any]) -> Iterator[str]:
    """What is wrong once the load is over; the rest goes into the result."""
    if not wait_until_idle(server):
        yield "it is not idle a minute after the last request"
    result["alone"] = compare(server, model, most)
    if result["alone"]["wrong"]:
        yield "answers differ from those of the same requests alone"
    for name in ("/health", "/metrics"):
        server.get(name)
    if server.metric("orthorank_up") == 0:
        yield "orthorank_up is 0"
    result["preemptions"] = server.metric("vllm:num_preemptions_total")


def main() -> None:
    """Load a server, print what came of it, and end with 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="of a running server")
    parser.add_argument("--seconds", type=float, default=600, help="of load")
    parser.add_argument("--clients", type=int, default=8, help="at once")
    parser.add_argument("--max-ratio", type=float, help="asked for (default: the server's own)")
    parser.add_argument("--pid", type=int, help="the server's, to watch its memory")
    parser.add_argument("--growth", type=float, default=MOST_GROWTH_MB, help="allowed, in MB")
    parser.add_argument("--compare", type=int, default=100, help="answers, at most")
    parser.add_argument("--api-key", help="the server's")
    arguments = parser.parse_args()
    server = Server(arguments.url, arguments.api_key)
    try:
        server.get("/v1/models")
    except UNANSWERED as error:
        parser.error(f"no server answers at {arguments.url} ({error})")
    result = soak(server, arguments)
    for line in result["failed"]:
        print(f"soak: {line}")
    print(json.dumps(result))
    sys.exit(bool(result["failed"]))


if __name__ == "__main__":
    main()
