"""`orthorank doctor URL` on pages that are made up, but for the metrics: those are a worker's."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest

from orthorank_vllm.cli.main import main
from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.metrics import collector
from orthorank_vllm.metrics.recorder import WorkerMetrics
from orthorank_vllm.options import LayerKeep
from orthorank_vllm.profiles import Cost

LITTLE = Cost({"prose": 0.004, "copy": 0.031}, 0.98)
# Of five layers: the ratio is 0.3.
CONFIG = OrthoRankConfig(
    ratio_asked=0.3,
    window=128,
    tail=4,
    num_layers=5,
    layers=(LayerKeep(3, 0.0), LayerKeep(1, 0.5)),
    source="profile p",
    expected=LITTLE,
)
Examine = Callable[..., tuple[int, dict[str, dict[str, str]]]]


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


def worker(config: OrthoRankConfig = CONFIG, engine: str = "0") -> WorkerMetrics:
    """A worker that tells what it runs."""
    made = WorkerMetrics({"model_name": "m", "engine": engine}, range(5))
    made.tell(config)
    return made


def serve(worker: WorkerMetrics, tokens: int, skipped: dict[int, int]) -> None:
    """Count one step with so many prompt tokens, of which layers skip some."""
    worker.count_prefill_step("sparse", tokens, 0.1, 1e-4)
    worker.count_updates(tokens, skipped)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the workers' counts."""
    monkeypatch.setenv(collector.FOLDER_VARIABLE, os.fspath(tmp_path))
    return tmp_path


@pytest.fixture
def examine(shared: Path, capsys: pytest.CaptureFixture[str]) -> Examine:
    """The exit status, and the checks of a server that shows the workers' metrics."""

    def examine(requests: int = 0, **pages: str | int) -> tuple[int, dict[str, dict[str, str]]]:
        registry = CollectorRegistry()
        ours = collector.FolderCollector(os.fspath(shared))
        ours.model_names.add("m")
        registry.register(ours)
        labels = ["model_name", "engine", "finished_reason"]
        finished = Counter("vllm:request_success", "vLLM's.", labels, registry=registry)
        finished.labels("m", "0", "stop").inc(requests)
        shown: dict[str, str | int] = {"health": "", "metrics": generate_latest(registry).decode()}
        with answering({f"/{name}": page for name, page in {**shown, **pages}.items()}) as url:
            status = main(["doctor", url, "--json"])
        return status, {check["what"]: check for check in json.loads(capsys.readouterr().out)}

    return examine
