"""`orthorank doctor URL` on servers that are not well; one that is well: engine_runs/."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from orthorank_vllm.cli.main import main
from orthorank_vllm.config import CALIBRATION_OFF, OrthoRankConfig
from orthorank_vllm.metrics import collector
from orthorank_vllm.metrics.recorder import WorkerMetrics
from tests.support.commands import refusal

CONFIG = OrthoRankConfig(0.3, 1 / 3, 128, (1, 3), 5, "profile p")
# The ratio that these layers make is 0.267: of 50 updates 13 are skipped.
REACHED, FAR_BELOW = {1: 6, 3: 7}, {1: 4, 3: 4}


@contextmanager
def answering(pages: dict[str, str | int]) -> Iterator[str]:
    """The URL of a server with some pages; a number is an error's status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path, 404)
            self.send_response(page if isinstance(page, int) else 200)
            self.end_headers()
            if isinstance(page, str):
                self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            """The test's output is the command's."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(collector.FOLDER_VARIABLE, os.fspath(tmp_path))
    return tmp_path


def worker(config: OrthoRankConfig = CONFIG, engine: str = "0") -> WorkerMetrics:
    made = WorkerMetrics({"model_name": "m", "engine": engine}, range(5))
    made.tell(config)
    return made


def examine(
    shared: Path, capsys: pytest.CaptureFixture[str], **pages: str | int
) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit status, and the checks of a server that shows the workers' metrics."""
    registry = CollectorRegistry()
    ours = collector.FolderCollector(os.fspath(shared))
    ours.model_names.add("m")
    registry.register(ours)
    shown: dict[str, str | int] = {"health": "", "metrics": generate_latest(registry).decode()}
    with answering({f"/{name}": page for name, page in {**shown, **pages}.items()}) as url:
        status = main(["doctor", url, "--json"])
    return status, {check["what"]: check for check in json.loads(capsys.readouterr().out)}


def test_a_server_that_does_as_asked_is_well(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker().count_updates(10, REACHED)
    status, checks = examine(shared, capsys)
    assert status == 0
    assert {check["state"] for check in checks.values()} == {"ok"}
    assert "asked 0.300, configured 0.267, reached 0.260" in checks["ratio"]["found"]
    assert checks["layers"]["found"] == "2 of 5 selective [1,3], chosen by profile p"


def test_a_server_without_orthorank_fails(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, checks = examine(shared, capsys, metrics="")
    assert status == 1
    assert checks["OrthoRank"]["state"] == "FAILED"
    assert "--orthorank-ratio" in checks["OrthoRank"]["mend"]


def test_guessed_layers_fail(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Break seen: a warning, with which the exit status is 0."""
    worker(replace(CONFIG, to_choose=1, num_layers=6).evenly_spaced(*CALIBRATION_OFF))
    status, checks = examine(shared, capsys)
    assert status == 1
    assert checks["layers"]["state"] == "FAILED"
    assert "not measured: --orthorank-calibrate-seconds is 0" in checks["layers"]["found"]
    assert "orthorank calibrate" in checks["layers"]["mend"]


def test_short_prompts_are_well_and_explained(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker().count_updates(10, FAR_BELOW)
    _, checks = examine(shared, capsys)
    assert checks["ratio"]["state"] == "ok"
    assert checks["ratio"]["mend"] == ""
    assert "prompts, or their chunks, are short" in checks["ratio"]["found"]


def test_no_ratio_is_compared_before_the_first_prompt(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker(replace(CONFIG, ratio_asked=None))
    _, checks = examine(shared, capsys)
    assert checks["ratio"]["state"] == "ok"
    assert "asked none" in checks["ratio"]["found"]


@pytest.mark.parametrize(("misses", "state"), [(1, "ok"), (20, "warning")])
def test_many_sink_misses_are_a_warning(
    shared: Path, capsys: pytest.CaptureFixture[str], misses: int, state: str
) -> None:
    worker().count_saved(1e9, sink_hits=100, sink_misses=misses)
    _, checks = examine(shared, capsys)
    assert checks["sinks"]["state"] == state


def test_each_engine_of_a_server_is_looked_at(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker(engine="0").count_updates(10, REACHED)
    worker(engine="1").count_updates(10, FAR_BELOW)
    _, checks = examine(shared, capsys)
    assert "are short" not in checks["ratio (engine 0)"]["found"]
    assert "are short" in checks["ratio (engine 1)"]["found"]


def test_metrics_of_which_some_are_missing_fail(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Break seen: `orthorank_up` not looked at."""
    worker(engine="0")
    (shared / "orthorank-1-0.db").touch()
    status, checks = examine(shared, capsys)
    assert status == 1
    assert checks["metrics"]["state"] == "FAILED"
    assert "orthorank_up is 0" in checks["metrics"]["found"]
    # What can be seen is still looked at.
    assert checks["ratio"]["state"] == "ok"


def test_metrics_of_which_all_are_missing_are_not_taken_for_a_server_without_orthorank(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, checks = examine(shared, capsys)
    assert status == 1
    assert checks["metrics"]["state"] == "FAILED"
    assert "OrthoRank" not in checks


def test_a_proxys_path_prefix_that_is_missing_is_asked_for(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the proxy answers 404 for all that is not below it."""
    status, checks = examine(shared, capsys, health=404)
    assert status == 1
    assert "prefix" in checks["server"]["mend"]


@pytest.mark.parametrize(
    ("page", "state"), [(401, "warning"), (404, "ok"), ('{"active": true}', "ok"), ("?", "warning")]
)
def test_the_endpoint_is_looked_at(
    shared: Path, capsys: pytest.CaptureFixture[str], page: str | int, state: str
) -> None:
    worker()
    _, checks = examine(shared, capsys, orthorank=page)
    assert checks["GET /orthorank"]["state"] == state


@pytest.mark.parametrize("page", [403, 500, "<html>Welcome</html>"])
def test_a_page_that_is_not_vllms_metrics_fails(
    shared: Path, capsys: pytest.CaptureFixture[str], page: str | int
) -> None:
    status, _ = examine(shared, capsys, metrics=page)
    assert status == 1


def test_an_unhealthy_server_fails(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, checks = examine(shared, capsys, health=503)
    assert status == 1
    assert checks["server"]["found"] == "/health answers 503"


def test_a_server_that_does_not_answer_fails_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with answering({}) as url:
        pass
    assert main(["doctor", url]) == 1
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"FAILED   server  {url} does not answer (")


@pytest.mark.parametrize(
    "url", ["localhost:8000", "http://", "ftp://host", "http://host:port", "http://h:99999"]
)
def test_what_is_not_a_url_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], url: str
) -> None:
    assert f"URL {url}: not allowed, give one like http" in refusal(capsys, "doctor", url)
