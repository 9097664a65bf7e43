"""`GET /orthorank` in an application like vLLM's, without an engine."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm import envs

from orthorank_vllm.engine.endpoint import StatusRoute, is_allowed
from orthorank_vllm.metrics import collector

Serve = Callable[..., TestClient]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    monkeypatch.setitem(vars(envs), "VLLM_API_KEY", None)
    # Not the counts of an engine that this process ran before.
    monkeypatch.setattr(collector, "_collector", None)
    monkeypatch.delenv(collector.FOLDER_VARIABLE, raising=False)
    with ExitStack() as running:

        def start(api_key: list[str] | None = None, root_path: str = "") -> TestClient:
            app = FastAPI(root_path=root_path)
            app.state.args = Namespace(api_key=api_key)
            app.add_middleware(StatusRoute)
            app.get("/health")(lambda: "well")
            return running.enter_context(TestClient(app, root_path=root_path))

        yield start


def test_a_server_without_a_key_answers_everyone_and_its_own_routes_stay(serve: Serve) -> None:
    client = serve()
    assert client.get("/orthorank").json()["active"] is False
    assert client.get("/health").json() == "well"
    assert client.get("/orthorank/more").status_code == 404
    assert client.post("/orthorank").status_code == 405


def test_the_route_is_found_behind_a_proxys_path(serve: Serve) -> None:
    assert serve(root_path="/proxy").get("/orthorank").status_code == 200


def test_the_route_wants_one_of_the_keys(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the command line go before the environment's, as in vLLM."""
    # Not by the environment: vLLM remembers that from its process's first engine on.
    monkeypatch.setitem(vars(envs), "VLLM_API_KEY", "environment")
    for client, right in (
        (serve(["one", "two"]), ("one", "two")),
        (serve(), ("environment",)),
    ):
        for key in ("one", "two", "environment", ""):
            answer = client.get("/orthorank", headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == (200 if key in right else 401)
        assert client.get("/orthorank").json() == {"error": "Unauthorized"}


@pytest.mark.parametrize(
    ("authorization", "allowed"),
    [
        ("Bearer key", True),
        ("bearer key", True),
        ("Bearer other", False),
        ("Bearer ", False),
        ("Bearer", False),
        ("Basic key", False),
        ("key", False),
        ("", False),
        (None, False),
        ("Bearer schlüssel", True),
        ("Bearer key ", False),
    ],
)
def test_a_key_is_compared_as_vllm_compares_it(authorization: str | None, allowed: bool) -> None:
    assert is_allowed(authorization, ["key", "schlüssel"]) is allowed
    assert is_allowed(authorization, [])
