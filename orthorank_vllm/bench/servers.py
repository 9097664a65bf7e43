"""Start, watch, ask and stop `vllm serve`, the way a user runs it."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

HOST = "127.0.0.1"
START_SECONDS = 1800
STOP_SECONDS = 15
REQUEST_SECONDS = 600
LOG_TAIL_LINES = 20
# What vLLM needs on a CPU and offline, unless the user chose otherwise.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": str(os.cpu_count() or 1),
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
# The engine in the process that asks for it, where its parts can be seen, and quiet.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}


def use_one_process() -> None:
    """Prepare this process for an engine in it, unless the user chose otherwise."""
    for name, value in {**ENVIRONMENT, **ONE_PROCESS}.items():
        os.environ.setdefault(name, value)


class ServerError(RuntimeError):
    """A server did not start, died, or gave an answer that cannot be used."""


@dataclass(frozen=True)
class Server:
    """A `vllm serve` with its own process group; `name` is also its served model name."""

    name: str
    port: int
    log: Path
    process: subprocess.Popen[bytes]

    def failure(self, what: str) -> ServerError:
        """What went wrong, followed by the end of the server's log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        tail = "".join(f"\n  {line}" for line in lines)
        return ServerError(f"{self.name}: {what}; the end of {self.log}:{tail}")


@contextmanager
def running(name: str, model: str, flags: Sequence[str], logs: Path) -> Iterator[Server]:
    """A healthy server, stopped however the block ends.

    Raises:
        ServerError: it does not become healthy.
    """
    port, log = _free_port(), logs / f"{name}.log"
    # Through this interpreter: the `vllm` found on PATH may belong to another environment.
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    command += ["--host", HOST, "--port", str(port), "--served-model-name", name, *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # `orthorank` is quiet, its servers' logs are not.
            env={**ENVIRONMENT, **os.environ, "VLLM_LOGGING_LEVEL": "INFO"},
            # A group of its own: Ctrl-C reaches this program alone, which then stops all of it.
            start_new_session=True,
        )
    server = Server(name, port, log, process)
    try:
        _wait_until_healthy(server)
        yield server
    finally:
        _stop(server)


def get(server: Server, path: str) -> str:
    """The text of a page, such as `/metrics`."""
    with _ask(server, "GET", path) as response:
        return response.read().decode()


@contextmanager
def completion(server: Server, body: Mapping[str, object]) -> Iterator[http.client.HTTPResponse]:
    """The answer of `/v1/completions`, its body still to be read."""
    with _ask(server, "POST", "/v1/completions", {"model": server.name, **body}) as response:
        yield response


@dataclass(frozen=True)
class Memory:
    """What a server's processes hold together, in MB.

    Attributes:
        private: what no other process shares, now.
        peak: resident at most, each process's own peak; shared pages count for each.
    """

    private: float
    peak: float


def memory_of(server: Server) -> Memory:
    """Read from /proc of the whole process tree."""
    root = psutil.Process(server.process.pid)
    processes = [root, *root.children(recursive=True)]
    private = sum(process.memory_full_info().uss for process in processes) / 1e6
    peak = 0.0
    for process in processes:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                peak += int(line.split()[1]) * 1024 / 1e6
    return Memory(private, peak)


@contextmanager
def _ask(
    server: Server, method: str, path: str, body: Mapping[str, object] | None = None
) -> Iterator[http.client.HTTPResponse]:
    # http.client: no proxy settings, no retries and no pool between the clock and the server.
    with closing(http.client.HTTPConnection(HOST, server.port, REQUEST_SECONDS)) as connection:
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.client.OK:
                answer = response.read().decode(errors="replace")
                raise ServerError(f"{server.name}: {path} answered {response.status}: {answer}")
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise server.failure(f"{path} failed ({error!r})") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(server: Server) -> None:
    started = time.monotonic()
    told = 0.0
    while not _is_healthy(server):
        seconds = time.monotonic() - started
        if server.process.poll() is not None:
            raise server.failure(f"exited with code {server.process.returncode} while starting")
        if seconds > START_SECONDS:
            raise server.failure(f"not healthy after {START_SECONDS} s")
        if seconds >= told:
            print(f"{server.name}: starting, {seconds:.0f} s", file=sys.stderr, flush=True)
            told += 15
        time.sleep(0.5)
    print(f"{server.name}: ready, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def _is_healthy(server: Server) -> bool:
    with closing(http.client.HTTPConnection(HOST, server.port, timeout=10)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False


def _stop(server: Server) -> None:
    """End the group; the engine must not outlive its server, even if Ctrl-C interrupts this."""
    group = server.process.pid
    try:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(group, signal.SIGTERM)
            server.process.wait(STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        server.process.wait()
