"""Two engines of a dense model behind two API servers, in a chart's folder of metrics."""

import json
import os
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
from openai.types import Completion
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from orthorank_vllm.metrics.status import as_json, engines_of
from tests.conftest import Prompts
from tests.support.counting import skipped_of
from tests.support.servers import API_KEY, NAME, Server, serving

pytestmark = pytest.mark.server

ENGINES = ("0", "1")
KEEPS = {1: 1 / 3, 3: 0.0, 4: 1 / 3}
TAIL = 16
# Two of them dense: no longer than their tail.
LENGTHS = (200, 140, 1, 333, 16)
Counts = tuple[int, int, int, int]


@pytest.fixture(scope="module")
def server(small_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shared = folder / "metrics"
    shared.mkdir()
    options = ["--orthorank-layers", "1,3:0,4", "--orthorank-tail", str(TAIL)]
    options += ["--data-parallel-size", "2", "--api-server-count", "2"]
    options += ["--enforce-eager", "--no-enable-prefix-caching"]
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(shared), "OMP_NUM_THREADS": "1"}
    with serving(small_model_path, folder, *options, **environment) as running:
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
    assert [server.metric("orthorank_active", engine) for engine in ENGINES] == [1, 1]


def ask(server: Server, prompt: list[int], engine: str) -> Completion:
    headers = {"X-data-parallel-rank": engine}
    return server.client.completions.create(
        model=NAME, prompt=prompt, max_tokens=3, temperature=0, logprobs=1, extra_headers=headers
    )


def told_by_one(server: Server) -> tuple[Counts, ...]:
    """By engine: prompt tokens, updates, skipped updates, and the layers' updates together.

    Over one connection, and so by one API server: what it says on both its pages.
    """
    connection = HTTPConnection(urlsplit(server.url).netloc, timeout=10)

    def page(path: str) -> str:
        connection.request("GET", path, headers={"Authorization": f"Bearer {API_KEY}"})
        return connection.getresponse().read().decode()

    engines = json.loads(page("/orthorank"))["engines"]
    families = text_string_to_metric_families(page("/metrics"))
    connection.close()
    assert engines == [json.loads(json.dumps(as_json(other))) for other in engines_of(families)]
    assert tuple(engine["engine"] for engine in engines) == ENGINES
    return tuple(
        (
            engine["prefill_tokens"],
            engine["token_updates"],
            engine["token_updates_skipped"],
            sum(layer["updates"] for layer in engine["by_layer"].values()),
        )
        for engine in engines
    )


def test_each_api_server_tells_the_same_exact_counts_of_each_engine(
    server: Server, prompts: Prompts
) -> None:
    """Break seen: a folder of the worker's own, which no API server reads."""
    before = told_by_one(server)
    for length in LENGTHS:
        ask(server, prompts.take(length), "0")
    ask(server, prompts.take(200), "1")
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

    for engine, lengths in enumerate((LENGTHS, (200,))):
        [told] = all_told
        prefilled, updates, skipped, by_layer = (
            later - earlier for earlier, later in zip(before[engine], told[engine], strict=True)
        )
        assert prefilled == sum(lengths)
        assert updates == by_layer
        assert updates + skipped == sum(lengths) * 6
        wanted = sum(
            skipped_of(length, keep, TAIL) for length in lengths for keep in KEEPS.values()
        )
        assert skipped == wanted > 0


def test_both_engines_answer_alike(server: Server, prompts: Prompts) -> None:
    prompt = prompts.take(200)
    first, second = (ask(server, prompt, engine).choices[0].logprobs for engine in ENGINES)
    assert first is not None
    assert second is not None
    assert second.tokens == first.tokens
    assert second.token_logprobs == pytest.approx(first.token_logprobs, abs=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_metrics_say_what_each_engine_runs_once(server: Server, engine: str) -> None:
    assert server.metric("orthorank_active", engine) == 1
    [(labels, _)] = server.samples("orthorank_config_info", engine)
    assert labels["layers"] == "1:0.3333,3:0,4:0.3333"
    assert labels["chosen_by"] == "--orthorank-layers"
    reached = (2 / 3 + 1 + 2 / 3) / 6
    assert server.metric("orthorank_ratio_configured", engine) == pytest.approx(reached)


def test_no_ratio_asked_is_told_as_none_was(server: Server) -> None:
    assert server.samples("orthorank_ratio_asked") == []


@pytest.mark.parametrize("engine", ENGINES)
def test_vllms_own_metrics_are_exact_too(server: Server, engine: str) -> None:
    """They lie in the same folder, and both API servers count in them."""
    told = server.metric("vllm:prompt_tokens_total", engine)
    assert told == server.metric("orthorank_prefill_tokens_total", engine) > 0
