"""A server under mixed load, and one that loses its engine: `tools/soak.py` in short.

Its KV cache is too small for the crowd, and some prompts are computed once more beside it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.servers import API_KEY, Server, children_of, serving

pytestmark = pytest.mark.server

SECONDS = 15
# In so short a time much is used for the first time; an hour tells more.
GROWTH_MB = 256
# Until a server whose engine is gone says so, and has ended.
END_SECONDS = 60.0


@pytest.fixture(scope="module")
def server(small_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    options = ["--orthorank-layers", "4:0,1:1/3,3:1/4", "--orthorank-ratio", "0.3"]
    options += ["--orthorank-max-ratio", "0.4", "--orthorank-shadow", "0.3", "--enforce-eager"]
    options += ["--max-model-len", "512", "--max-num-seqs", "16"]
    options += ["--block-size", "32", "--num-gpu-blocks-override", "20"]
    with serving(small_model_path, folder, *options) as running:
        yield running


def soak(server: Server, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "soak.py"), server.url, "--api-key", API_KEY]
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=300, check=False
    )


def test_nothing_is_left_of_a_mixed_load_and_answers_are_those_of_requests_alone(
    server: Server,
) -> None:
    done = soak(
        server,
        *("--seconds", str(SECONDS), "--pid", str(server.process.pid)),
        *("--clients", "12", "--compare", "40", "--growth", str(GROWTH_MB)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert told["failed"] == told["errors"] == []
    assert len(told["requests"]) == 4
    assert told["alone"]["compared"] >= 10
    assert told["alone"]["wrong"] == 0
    assert told["preemptions"] > 0, "the KV cache was never full"
    assert len(told["private_mb"]) == 3
    assert "Traceback" not in server.log.read_text()


def test_it_says_what_is_wrong(server: Server) -> None:
    """A ratio that the server refuses, and an allowance for memory below nothing."""
    done = soak(
        server,
        *("--seconds", "10", "--pid", str(server.process.pid), "--compare", "0"),
        *("--max-ratio", "0.9", "--growth", "-1000"),
    )
    assert done.returncode == 1
    assert "soak: requests failed" in done.stdout
    assert "soak: its private memory grew" in done.stdout
    assert "status 400" in json.loads(done.stdout.splitlines()[-1])["errors"][0]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1"])
def test_no_server_is_told_in_one_line(url: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / "soak.py"), url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"soak.py: error: no server answers at {url} (" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_server_whose_engine_is_killed_is_unhealthy_and_ends(server: Server) -> None:
    """So that whoever watches it starts another one. The last test here: nothing is left."""
    [engine] = [
        child
        for child in children_of(server.process.pid)
        if "EngineCore" in Path(f"/proc/{child}/cmdline").read_text()
        or "EngineCore" in Path(f"/proc/{child}/comm").read_text()
    ]
    os.kill(engine, signal.SIGKILL)
    deadline = time.monotonic() + END_SECONDS
    while server.process.poll() is None:
        assert time.monotonic() < deadline, "it lives on without its engine"
        time.sleep(0.2)
    with pytest.raises(OSError, match="refused"):
        server.get("/health")
