"""`vllm serve MODEL --orthorank-ratio 0.3`, over HTTP, in vLLM's default configuration.

The engine runs in a process of its own and the model is compiled, as a user has it.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import Prompts
from tests.reference import Reference, Request, Rule
from tests.replay import SAFE_MARGIN, TOLERANCE

pytestmark = pytest.mark.server

NAME = "smollm2"
RATIO = 0.3
LAYERS = (3, 4, 5, 6, 7, 12, 13, 14, 15, 16, 17, 18, 25, 26)
START_SECONDS = 300


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return {**kept, "VLLM_LOGGING_LEVEL": "INFO"}


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return str(response.read().decode())

    def metric(self, name: str) -> float:
        pattern = rf'^{name}{{engine="0",model_name="{NAME}"}} (\S+)$'
        found = re.search(pattern, self.get("/metrics"), re.MULTILINE)
        assert found, f"{name} is not on /metrics"
        return float(found[1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    port = free_port()
    command = [Path(sys.executable).parent / "vllm", "serve", model_path]
    command += ["--served-model-name", NAME, "--dtype", "float32", "--max-model-len", "2048"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--orthorank-ratio", str(RATIO)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=output, stderr=output, env=environment()
        )
    running = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        wait_until_healthy(running)
        yield running
    finally:
        process.kill()
        process.wait()


def wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            pytest.fail(f"the server ended:\n{server.log.read_text()[-4000:]}")
        try:
            server.get("/health")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"not healthy after {START_SECONDS} s:\n{server.log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def reference(model_path: str) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    return Reference(model, Rule(layers=LAYERS))


def reference_logprobs(
    reference: Reference, prompt: list[int], generated: list[int]
) -> tuple[Request, list[torch.Tensor]]:
    request = reference.start(prompt)
    rows = [request.forward(0, len(prompt))[-1]]
    for position, token in enumerate(generated[:-1], start=len(prompt)):
        request.append(token)
        rows.append(request.forward(position, position + 1)[0])
    return request, rows


def safe_prompt(reference: Reference, prompts: Prompts, length: int) -> list[int]:
    """One in which float noise decides nothing."""
    while True:
        prompt = prompts.take(length)
        request = reference.start(prompt)
        request.forward(0, length)
        if request.margin > SAFE_MARGIN:
            return prompt


def test_the_start_up_line_says_what_is_run(server: Server) -> None:
    lines = [line for line in server.log.read_text().splitlines() if "OrthoRank is active" in line]
    assert len(lines) == 1
    assert (
        "ratio 0.311 (asked for 0.3), keep 0.333, window 128, 14 of 30 layers selective "
        "[3,4,5,6,7,12,13,14,15,16,17,18,25,26], chosen by profile SmolLM2-135M-Instruct, "
        "attention: cpu"
    ) in lines[0]


def test_a_completion_equals_the_reference(
    server: Server, reference: Reference, prompts: Prompts
) -> None:
    """Prefill is sparse and decode compiled: both have to meet the reference."""
    prompt = safe_prompt(reference, prompts, 500)
    answer = server.client.completions.with_raw_response.create(
        model=NAME,
        prompt=prompt,
        max_tokens=6,
        temperature=0,
        logprobs=1,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    choice = json.loads(answer.text)["choices"][0]
    generated = choice["token_ids"]
    assert len(generated) == 6
    _, rows = reference_logprobs(reference, prompt, generated)
    for row, token, told in zip(rows, generated, choice["logprobs"]["token_logprobs"], strict=True):
        assert abs(float(row[token]) - told) < TOLERANCE


def test_a_streamed_completion_is_the_same_as_a_whole_one(server: Server) -> None:
    options: dict[str, Any] = {
        "model": NAME,
        "prompt": "The capital of France is",
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = server.client.completions.create(**options).choices[0].text
    streamed = [
        chunk.choices[0].text for chunk in server.client.completions.create(**options, stream=True)
    ]
    assert len(streamed) > 1
    assert "".join(streamed) == whole


def test_a_streamed_chat_is_the_same_as_a_whole_one(server: Server) -> None:
    options: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Name three colours of the rainbow."}],
        "max_tokens": 16,
        "temperature": 0,
    }
    whole = server.client.chat.completions.create(**options).choices[0].message.content
    streamed = [
        chunk.choices[0].delta.content or ""
        for chunk in server.client.chat.completions.create(**options, stream=True)
    ]
    assert whole
    assert "".join(streamed) == whole


def test_the_counts_on_metrics_are_exact(
    server: Server, reference: Reference, prompts: Prompts
) -> None:
    """The engine is another process."""
    names = ["prefill_tokens", "token_updates", "token_updates_skipped"]
    before = [server.metric(f"orthorank_{name}_total") for name in names]
    prompt = prompts.take(334)[1:]  # no other test's, so nothing of it is cached
    server.client.completions.create(model=NAME, prompt=prompt, max_tokens=4, temperature=0)
    after = [server.metric(f"orthorank_{name}_total") for name in names]
    request, _ = reference_logprobs(reference, prompt, [0])
    counted = [later - earlier for earlier, later in zip(before, after, strict=True)]
    assert counted == [len(prompt), request.updates, request.skipped]


def test_vllms_own_metrics_stay(server: Server) -> None:
    assert server.metric("orthorank_active") == 1
    assert server.metric("vllm:prompt_tokens_total") > 0


def test_a_mistake_in_a_request_is_answered_by_vllm(server: Server) -> None:
    with pytest.raises(openai.BadRequestError):
        server.client.completions.create(model=NAME, prompt=[1] * 3000, max_tokens=4)


def test_the_server_stops_on_ctrl_c_and_leaves_nothing(server: Server) -> None:
    """Last in the file: it ends the server."""
    metrics_folders = set(Path(tempfile.gettempdir()).glob("orthorank-metrics-*"))
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=30) in (0, 130, -signal.SIGINT)
    ended = {folder for folder in metrics_folders if not folder.exists()}
    assert len(ended) == 1
