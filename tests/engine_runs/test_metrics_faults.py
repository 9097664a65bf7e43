"""One server whose files of metrics are broken in every way while it serves."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orthorank_vllm.cli.main import main
from tests.metrics.breaks import Fault, cut, empty, overwrite, remove_the_folder
from tests.support.models import write_random
from tests.support.servers import API_KEY, NAME, Server, serving

pytestmark = pytest.mark.server

LENGTH = 200
# The workers look after their files every 5.
SECONDS = 15.0
PREFIX = "/api"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    model = write_random("Llama", folder / "model")
    options = ["--orthorank-layers", "1,3", "--enforce-eager", "--no-enable-prefix-caching"]
    options += ["--skip-tokenizer-init", "--max-model-len", "512", "--root-path", PREFIX]
    # Not there: `tempfile`, and so the server, has to find another.
    with serving(model, folder, *options, TMPDIR=os.fspath(folder / "gone")) as running:
        yield running


def ask(server: Server) -> None:
    prompt = [position % 500 for position in range(LENGTH)]
    server.client.completions.create(
        model=NAME, prompt=prompt, max_tokens=2, extra_body={"detokenize": False}
    )


def told(server: Server) -> dict[str, float]:
    """Values on `/metrics`, by name."""
    families = text_string_to_metric_families(server.get("/metrics"))
    return {sample.name: sample.value for family in families for sample in family.samples}


def up_again(server: Server) -> dict[str, float]:
    deadline = time.monotonic() + SECONDS
    while (values := told(server))["orthorank_up"] != 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return values


def complaints(server: Server) -> int:
    return server.log.read_text().count("(orthorank_up 0)")


def put_an_empty_one_beside_it(file: Path) -> None:
    file.with_name("counter_orthorank-1-0.db").touch()


def put_a_folder_beside_it(file: Path) -> None:
    file.with_name("counter_orthorank-2-0.db").mkdir()


def test_the_server_starts_where_tmpdir_is_not_there(server: Server) -> None:
    assert told(server)["orthorank_up"] == 1


@pytest.mark.parametrize("path", ["", PREFIX])
def test_the_doctor_finds_a_server_behind_a_prefix_well(
    server: Server, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    """Whether the proxy hands the prefix on or not."""
    assert main(["doctor", f"{server.url}{path}/v1", "--api-key", API_KEY, "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    states = {check["what"]: check["state"] for check in checks}
    # Of layers that were given by hand nobody knows it.
    assert states.pop("expected loss") == "warning"
    assert set(states.values()) == {"ok"}
    assert checks[-1]["found"] == "on"


# Folders and empty files beside the worker's own are nobody's to mend, so they come last.
@pytest.mark.parametrize(
    "fault",
    [empty, cut, overwrite, remove_the_folder, put_an_empty_one_beside_it, put_a_folder_beside_it],
    ids=lambda fault: fault.__name__,
)
def test_vllms_metrics_stay_and_no_count_is_lost(
    server: Server, capsys: pytest.CaptureFixture[str], fault: Fault
) -> None:
    """Break seen: a mapped file, with which the engine died, and prometheus-client's reader."""
    before = up_again(server)
    file = server.counts_file()
    fault(file)
    broken = told(server)
    assert broken["orthorank_up"] == 0
    assert broken["vllm:prompt_tokens_total"] == before["vllm:prompt_tokens_total"]
    assert complaints(server) > 0
    assert main(["doctor", server.url]) == 1
    assert "FAILED   metrics" in capsys.readouterr().out
    ask(server)
    for left in file.parent.glob("counter_*"):
        # Ours are the worker's again; these are whoever's that made them.
        assert told(server)["orthorank_prefill_tokens_total"] > 0
        left.rmdir() if left.is_dir() else left.unlink()
    after = up_again(server)
    for name in ("vllm:prompt_tokens_total", "orthorank_prefill_tokens_total"):
        assert after[name] == before[name] + LENGTH
    assert json.loads(server.get("/orthorank", API_KEY))["metrics_up"] is True


def test_nothing_is_told_twice_a_minute(server: Server) -> None:
    before = up_again(server)
    remove_the_folder(server.counts_file())
    for _ in range(10):
        assert told(server)["vllm:prompt_tokens_total"] == before["vllm:prompt_tokens_total"]
    # One for each of the six causes above at most, though each was seen many times.
    assert complaints(server) <= 7
