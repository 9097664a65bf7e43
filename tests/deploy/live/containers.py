"""Containers of the image, and how to talk to the servers in them."""

import http.client
import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.tools import tool

ENVIRONMENT = {
    "STORAGE_DRIVER": "overlay",
    "CONTAINERS_CONF": str(Path(__file__).with_name("containers.conf")),
}
HARDENED = (
    *("--read-only", "--tmpfs", "/tmp", "--shm-size", "1g", "--network", "host"),
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
)
CPU = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
NAME = "six"
# Its six layers have no profile; these two make a ratio of 0.222.
SPARSE = ("--orthorank-ratio", "0.2", "--orthorank-layers", "2,4")
# Not compiled: started sooner.
EAGER = ("--enforce-eager",)
START_SECONDS = 600


def podman(*arguments: str | Path) -> str:
    return tool("podman", *arguments, **ENVIRONMENT)


@dataclass(frozen=True)
class Server:
    """A server in a container, which `kill` and `stop` end and `logs` tells of."""

    name: str
    port: int
    key: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return str(response.read().decode())

    def metric(self, name: str) -> float:
        """The sum over its labels."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name)]
        assert lines, f"no {name}"
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def logs(self) -> str:
        return podman("logs", self.name)

    def is_running(self) -> bool:
        return podman("inspect", "-f", "{{.State.Running}}", self.name).strip() == "true"

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if is_healthy(self.url):
                return
            if not self.is_running():
                pytest.fail(f"{self.name} ended:\n{self.logs()[-8000:]}")
            time.sleep(1)
        pytest.fail(f"{self.name} is not healthy after {START_SECONDS} s:\n{self.logs()[-4000:]}")


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=30):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def post(
    url: str, body: Mapping[str, Any], key: str | None = None, timeout: float = 300
) -> http.client.HTTPResponse:
    """The answer of /v1/completions, its body still to be read."""
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps({"model": NAME, **body}).encode(), headers
    )
    response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=timeout)
    return response


def completion(url: str, body: Mapping[str, Any], key: str | None = None) -> dict[str, Any]:
    with post(url, body, key) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def free_port() -> int:
    """One of those that ORTHORANK_TEST_PORTS names, such as 8200-8299, or any."""
    first, _, last = os.environ.get("ORTHORANK_TEST_PORTS", "0-0").partition("-")
    for port in range(int(first), int(last) + 1):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    pytest.fail("no port is free")


@contextmanager
def running(
    image: str, model: Path, options: Sequence[str] = SPARSE, key: str | None = None
) -> Iterator[Server]:
    """A healthy server of the image, as locked down as it can be; removed at the end."""
    port = free_port()
    server = Server(f"orthorank-test-{port}", port, key)
    environment = {**CPU, "PORT": str(server.port), **({"VLLM_API_KEY": key} if key else {})}
    command = ["run", "--detach", "--name", server.name, *HARDENED]
    command += ["--volume", f"{model}:/models/{NAME}:ro"]
    for name, value in environment.items():
        command += ["--env", f"{name}={value}"]
    command += [image, f"/models/{NAME}", "--served-model-name", NAME, "--dtype", "float32"]
    command += ["--max-model-len", "2048", "--port", str(server.port)]
    command += [*options, "--shutdown-timeout", "60"]
    try:
        podman(*command)
        server.wait_until_healthy()
        yield server
    finally:
        podman("rm", "--force", "--ignore", "--volumes", "--time", "0", server.name)
