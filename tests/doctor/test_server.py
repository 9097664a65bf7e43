"""`orthorank doctor URL` on servers that are not well; one that is well: engine_runs/."""

from pathlib import Path

import pytest

from orthorank_vllm.cli.main import main
from tests.doctor.conftest import Examine, answering, worker
from tests.support.commands import refusal


def test_a_server_without_orthorank_fails(examine: Examine) -> None:
    status, checks = examine(metrics="")
    assert status == 1
    assert checks["OrthoRank"]["state"] == "FAILED"
    assert "--orthorank-ratio" in checks["OrthoRank"]["mend"]


def test_metrics_of_which_some_are_missing_fail(examine: Examine, shared: Path) -> None:
    """Break seen: `orthorank_up` not looked at."""
    worker(engine="0")
    (shared / "orthorank-1-0.db").touch()
    status, checks = examine()
    assert status == 1
    assert checks["metrics"]["state"] == "FAILED"
    assert "orthorank_up is 0" in checks["metrics"]["found"]
    # What can be seen is still looked at.
    assert checks["ratio"]["state"] == "ok"


def test_metrics_of_which_all_are_missing_are_not_taken_for_a_server_without_orthorank(
    examine: Examine,
) -> None:
    status, checks = examine()
    assert status == 1
    assert checks["metrics"]["state"] == "FAILED"
    assert "OrthoRank" not in checks


def test_a_proxys_path_prefix_that_is_missing_is_asked_for(examine: Examine) -> None:
    """As the proxy answers 404 for all that is not below it."""
    status, checks = examine(health=404)
    assert status == 1
    assert "prefix" in checks["server"]["mend"]


@pytest.mark.parametrize(
    ("page", "state"), [(401, "warning"), (404, "ok"), ('{"active": true}', "ok"), ("?", "warning")]
)
def test_the_endpoint_is_looked_at(examine: Examine, page: str | int, state: str) -> None:
    worker()
    _, checks = examine(orthorank=page)
    assert checks["GET /orthorank"]["state"] == state


@pytest.mark.parametrize("page", [403, 500, "<html>Welcome</html>"])
def test_a_page_that_is_not_vllms_metrics_fails(examine: Examine, page: str | int) -> None:
    status, _ = examine(metrics=page)
    assert status == 1


def test_an_unhealthy_server_fails(examine: Examine) -> None:
    status, checks = examine(health=503)
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
