"""Several API servers before one engine, in a folder of metrics that a chart has set."""

import json
import os
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from orthorank_vllm.metrics.status import as_json, engines_of
from tests.conftest import Prompts
from tests.support.servers import API_KEY, NAME, Server, serving

pytestmark = pytest.mark.server

LAYERS = (7, 14, 26)
LENGTHS = (200, 140, 1, 333, 64)


@pytest.fixture(scope="module")
def server(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shared = folder / "metrics"
    shared.mkdir()
    options = ["--orthorank-layers", ",".join(map(str, LAYERS))]
    options += ["--api-server-count", "2", "--enforce-eager", "--no-enable-prefix-caching"]
    with serving(model_path, folder, *options, PROMETHEUS_MULTIPROC_DIR=str(shared)) as running:
        yield running


def test_a_broken_file_of_ours_takes_nothing_down(server: Server) -> None:
    """Break seen: it lay in the folder that vLLM's own metrics are read from."""
    file = server.counts_file()
    os.truncate(file, 0)
    assert server.metric("vllm:prompt_tokens_total") >= 0
    assert " 0.0" in next(
        line for line in server.get("/metrics").splitlines() if line.startswith("orthorank_up{")
    )
    deadline = time.monotonic() + 15
    while file.stat().st_size == 0:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert server.metric("orthorank_active") == 1


def told_by_one(server: Server) -> tuple[float, ...]:
    """Prompt tokens, updates, skipped updates, and the layers' updates together.

    Over one connection, and so by one API server: what it says on both its pages.
    """
    connection = HTTPConnection(urlsplit(server.url).netloc, timeout=10)

    def page(path: str) -> str:
        connection.request("GET", path, headers={"Authorization": f"Bearer {API_KEY}"})
        return connection.getresponse().read().decode()

    [engine] = json.loads(page("/orthorank"))["engines"]
    families = text_string_to_metric_families(page("/metrics"))
    connection.close()
    assert [engine] == [json.loads(json.dumps(as_json(other))) for other in engines_of(families)]
    by_layer = sum(layer["updates"] for layer in engine["by_layer"].values())
    updates, skipped = engine["token_updates"], engine["token_updates_skipped"]
    return engine["prefill_tokens"], updates, skipped, by_layer


def test_each_api_server_tells_the_same_exact_counts(server: Server, prompts: Prompts) -> None:
    """Break seen: a folder of the worker's own, which no API server reads."""
    before = told_by_one(server)
    for length in LENGTHS:
        server.client.completions.create(model=NAME, prompt=prompts.take(length), max_tokens=3)
    all_told = {told_by_one(server) for _ in range(20)}
    assert len(all_told) == 1
    # Each API server counts the requests that it answered in a file of its own.
    answered = [
        sample.value
        for file in (server.log.parent / "metrics").glob("counter_[0-9]*.db")
        for metric in MultiProcessCollector.merge([os.fspath(file)])
        for sample in metric.samples
        if sample.name == "http_requests_total" and sample.labels["handler"] == "/orthorank"
    ]
    assert len(answered) == 2
    assert sum(answered) == 21

    prefilled, updates, skipped, by_layer = (
        later - earlier for earlier, later in zip(before, all_told.pop(), strict=True)
    )
    assert prefilled == sum(LENGTHS)
    assert updates == by_layer
    assert updates + skipped == sum(LENGTHS) * 30
    # ceil(m / 3) of each window's m tokens are updated, and the last token perhaps beside them.
    windows = [divmod(length, 128) for length in LENGTHS if length > 1]
    most = sum(full * (128 - 43) + rest - -(-rest // 3) for full, rest in windows)
    assert len(LAYERS) * (most - len(windows)) <= skipped <= len(LAYERS) * most


def test_metrics_say_what_is_run_once(server: Server) -> None:
    assert server.metric("orthorank_active") == 1
    [(labels, _)] = server.samples("orthorank_config_info")
    assert labels["layers"] == "7,14,26"
    assert labels["chosen_by"] == "--orthorank-layers"
    assert server.metric("orthorank_ratio_configured") == pytest.approx(3 / 30 * 2 / 3)


def test_no_ratio_asked_is_told_as_none_was(server: Server) -> None:
    assert server.samples("orthorank_ratio_asked") == []


def test_vllms_own_metrics_are_exact_too(server: Server) -> None:
    """They lie in the same folder, and both API servers count in them."""
    told = server.metric("vllm:prompt_tokens_total")
    assert told == server.metric("orthorank_prefill_tokens_total") > 0
