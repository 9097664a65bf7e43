"""The dashboard's expressions and the alerts, on a real Prometheus that scrapes a real server."""

import http.server
import json
import math
import random
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.live.containers import EAGER, SPARSE, Server, completion, free_port, running
from tests.deploy.test_dashboard import expressions
from tests.deploy.tools import ALERTS, DOCKER

WORDS = ("river", "stone", "seven", "green", "quick", "paper", "under", "light")
SCRAPE_SECONDS = 1
RATE_SECONDS = 60
WAIT_SECONDS = 180
INACTIVE = "OrthoRankInactive"


@contextmanager
def program(*command: str | Path, log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen([*map(str, command)], stdout=output, stderr=output)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


class Webhook(http.server.ThreadingHTTPServer):
    """What Alertmanager tells, as it comes."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        told = self.told

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                told.extend(json.loads(body)["alerts"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", free_port()), Handler)


def wait_for(what: str, found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            if answer := found():
                return answer
        except OSError:
            pass  # a program that is still starting
        time.sleep(1)
    return pytest.fail(f"{what}: not within {WAIT_SECONDS} s")


@pytest.fixture(scope="module")
def sparse(image: str, model: Path) -> Iterator[Server]:
    with running(image, model, (*SPARSE, *EAGER, "--orthorank-shadow", "1")) as started:
        yield started


@pytest.fixture(scope="module")
def stock(image: str, model: Path) -> Iterator[Server]:
    """A server whose flags were lost."""
    with running(image, model, EAGER) as started:
        yield started


class Prometheus:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/"

    def _get(self, path: str, **query: str) -> Any:
        url = self._url + path + "?" + urllib.parse.urlencode(query)
        with urllib.request.urlopen(url, timeout=30) as response:
            return json.load(response)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples that are numbers."""
        result: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return [each for each in result if not math.isnan(float(each["value"][1]))]

    def alerts(self) -> dict[str, str]:
        """The state by the alert's name and its instance."""
        return {
            each["labels"]["alertname"] + " " + each["labels"].get("instance", ""): each["state"]
            for each in self._get("alerts")["alerts"]
        }


@pytest.fixture(scope="module")
def webhook() -> Iterator[Webhook]:
    server = Webhook()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def prometheus(
    sparse: Server, stock: Server, webhook: Webhook, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Configured by the files that compose mounts, but for addresses and for how long it waits."""
    folder = tmp_path_factory.mktemp("prometheus")
    port, manager_port = free_port(), free_port()
    while manager_port == port:
        manager_port += 1

    rules = yaml.safe_load(ALERTS.read_text())
    for rule in rules["groups"][0]["rules"]:
        rule["for"] = "5s"
    (folder / "alerts.yaml").write_text(yaml.safe_dump(rules))

    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    config["global"] = {
        "scrape_interval": f"{SCRAPE_SECONDS}s",
        "evaluation_interval": f"{SCRAPE_SECONDS}s",
    }
    manager = config["alerting"]["alertmanagers"][0]["static_configs"][0]
    manager["targets"] = [f"127.0.0.1:{manager_port}"]
    target = config["scrape_configs"][0]["static_configs"][0]
    target["targets"] = [f"127.0.0.1:{server.port}" for server in (sparse, stock)]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))

    told = yaml.safe_load((DOCKER / "alertmanager.yml").read_text())
    told["route"]["group_wait"] = "1s"
    url = f"http://127.0.0.1:{webhook.server_address[1]}/"
    told["receivers"][0]["webhook_configs"] = [{"url": url}]
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(told))

    with (
        program(
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            log=folder / "prometheus.log",
        ),
        program(
            "prometheus-alertmanager",
            f"--config.file={folder / 'alertmanager.yml'}",
            f"--storage.path={folder / 'manager'}",
            f"--web.listen-address=127.0.0.1:{manager_port}",
            "--cluster.listen-address=",
            log=folder / "alertmanager.log",
        ),
    ):
        started = Prometheus(port)
        wait_for("Prometheus scrapes both servers", lambda: len(started.query("up == 1")) == 2)
        yield started


def prompts() -> Iterator[str]:
    """Long ones that share their first half (a cached prefix, a remembered sink), and short."""
    words = random.Random(0)
    half = " ".join(words.choices(WORDS, k=250))
    while True:
        yield half + " " + " ".join(words.choices(WORDS, k=250))
        yield "Hi"


@pytest.fixture(scope="module")
def under_load(prometheus: Prometheus, sparse: Server) -> Iterator[Prometheus]:
    """While requests keep coming, and have for a while."""
    ended = threading.Event()
    source, lock = prompts(), threading.Lock()

    def client() -> None:
        while not ended.is_set():
            with lock:
                prompt = next(source)
            completion(sparse.url, {"prompt": prompt, "max_tokens": 8, "ignore_eos": True})

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(client) for _ in range(3)]
        try:
            wait_for(
                "the sparse server computes prompts",
                lambda: sparse.metric("orthorank_prefill_tokens_total") > 5000,
            )
            time.sleep(10 * SCRAPE_SECONDS)
            yield prometheus
        finally:
            ended.set()
        for each in clients:
            each.result()


@pytest.mark.parametrize("number", range(len(expressions())))
def test_an_expression_of_the_dashboard_returns_data(under_load: Prometheus, number: int) -> None:
    expression = expressions()[number]
    for variable, value in {
        "$__rate_interval": f"{RATE_SECONDS}s",
        "$model_name": ".*",
        "$instance": ".*",
    }.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression
    if "orthorank_expected_" in expression:
        # Absent: layers that were given by hand were not measured.
        assert under_load.query(expression) == []
        return
    assert wait_for(expression, lambda: under_load.query(expression))


def test_only_the_server_that_lost_its_flags_is_told_of(
    under_load: Prometheus, sparse: Server, stock: Server, webhook: Webhook
) -> None:
    """From the rule through Alertmanager to a webhook."""
    inactive = wait_for(
        "Alertmanager tells the webhook",
        lambda: [each for each in webhook.told if each["labels"]["alertname"] == INACTIVE],
    )
    assert {each["labels"]["instance"] for each in inactive} == {f"127.0.0.1:{stock.port}"}
    assert inactive[0]["status"] == "firing"
    assert "should run OrthoRank and does not" in inactive[0]["annotations"]["summary"]
    assert [name for name in under_load.alerts() if str(sparse.port) in name] == []
