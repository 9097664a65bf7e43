"""Two replicas behind nginx; one is killed while both have requests."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.deploy.live.containers import (
    EAGER,
    SPARSE,
    Server,
    completion,
    free_port,
    is_healthy,
    podman,
    running,
)
from tests.deploy.tools import ROOT

CONFIGURATION = ROOT / "deploy" / "replicas" / "nginx.conf"
CLIENTS = 6
REQUESTS = 48
TOKENS = 24


@pytest.fixture(scope="module")
def replicas(image: str, model: Path) -> Iterator[list[Server]]:
    options = SPARSE + EAGER
    with running(image, model, options) as first, running(image, model, options) as second:
        yield [first, second]


@pytest.fixture
def balancer(replicas: list[Server], tmp_path: Path) -> Iterator[str]:
    """nginx with the configuration as it is, but for its port; its address."""
    port = free_port()
    text = CONFIGURATION.read_text()
    assert "listen 8080;" in text
    text = text.replace("listen 8080;", f"listen 127.0.0.1:{port};")
    (tmp_path / "nginx.conf").write_text(f"pid {tmp_path}/pid;\ndaemon off;\n{text}")
    lines = [f"server 127.0.0.1:{server.port};\n" for server in replicas]
    (tmp_path / "replicas.conf").write_text("".join(lines))
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    with (tmp_path / "log").open("wb") as log:
        command = [nginx, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        while not is_healthy(url):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def test_no_request_is_lost_when_a_replica_is_killed(balancer: str, replicas: list[Server]) -> None:
    """Break seen: without `non_idempotent` nginx answers 502."""
    dying, other = replicas

    def ask(number: int) -> int:
        prompt = f"Request {number}: " + "one two three " * 60
        body = {"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True}
        return int(completion(balancer, body)["usage"]["completion_tokens"])

    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(ask, number) for number in range(REQUESTS)]
        # Not before it has answered some, and is in the midst of others.
        while not (
            dying.metric("vllm:request_success_total") > 1
            and dying.metric("vllm:num_requests_running") > 0
        ):
            assert not all(each.done() for each in asked)
            time.sleep(0.05)
        served_before = other.metric("vllm:request_success_total")
        podman("kill", "--signal", "KILL", dying.name)
        answers = [each.result() for each in asked]
    assert not dying.is_running()
    assert answers == [TOKENS] * REQUESTS
    assert other.metric("vllm:request_success_total") - served_before > REQUESTS // 4
