"""`vllm serve` as a user starts it: the engine in a process of its own."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

NAME = "smollm2"
API_KEY = "a key"
START_SECONDS = 300


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def counts_file(self) -> Path:
        """The file that the worker writes its counts to: one that some child has open."""
        for child in children_of(self.process.pid):
            for descriptor in Path(f"/proc/{child}/fd").iterdir():
                with suppress(FileNotFoundError):
                    opened = descriptor.readlink()
                    if opened.parent.name.startswith("orthorank-metrics-") and opened.suffix:
                        return opened
        pytest.fail("no process has a file of counts open")

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=API_KEY)

    def get(self, path: str, api_key: str | None = None) -> str:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as response:
            return str(response.read().decode())

    def samples(self, name: str, engine: str = "0") -> list[tuple[dict[str, str], float]]:
        """Labels and value of each sample of one engine on `/metrics`."""
        found = [
            ({**sample.labels}, float(sample.value))
            for family in text_string_to_metric_families(self.get("/metrics"))
            for sample in family.samples
            if sample.name == name and sample.labels["engine"] == engine
        ]
        for labels, _ in found:
            assert (labels.pop("engine"), labels.pop("model_name")) == (engine, NAME)
        return found

    def metric(self, name: str, engine: str = "0", **labels: str) -> float:
        found = [value for given, value in self.samples(name, engine) if given == labels]
        assert len(found) == 1, f"{name} {labels} is {len(found)} times on /metrics"
        return found[0]


def children_of(process: int) -> Iterator[int]:
    """The ids of its children, and theirs."""
    for thread in Path(f"/proc/{process}/task").iterdir():
        for child in map(int, (thread / "children").read_text().split()):
            yield child
            yield from children_of(child)


@contextmanager
def serving(model_path: str, folder: Path, *options: str, **environment: str) -> Iterator[Server]:
    """A server that answers, with OrthoRank's endpoint and an API key.

    Args:
        folder: for its log.
    """
    log = folder / "log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [os.fspath(Path(sys.executable).parent / "vllm"), "serve", model_path]
    command += ["--served-model-name", NAME, "--dtype", "float32", "--max-model-len", "2048"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--orthorank-endpoint", *options]
    kept = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    kept |= {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_API_KEY": API_KEY}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**kept, **environment}
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        _wait_until_healthy(server)
        yield server
    finally:
        # Several API servers are children that a kill would leave behind.
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_healthy(server: Server) -> None:
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
