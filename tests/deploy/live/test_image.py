"""The image, locked down as a careful platform runs it: a completion over HTTP, and its end."""

import json
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.live.conftest import BASE, REVISION
from tests.deploy.live.containers import Server, completion, podman, post, running
from tests.deploy.test_tags import VERSION

KEY = "sesame"
STOP_SECONDS = 60


@pytest.fixture(scope="module")
def server(image: str, model: Path) -> Iterator[Server]:
    """In vLLM's default configuration, which compiles the model and keeps what it made."""
    with running(image, model, key=KEY) as started:
        yield started


def inside(server: Server, *command: str) -> str:
    return podman("exec", server.name, *command).strip()


def test_it_completes_a_prompt(server: Server) -> None:
    answer = completion(server.url, {"prompt": "The capital of France is", "max_tokens": 8}, KEY)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 8


def test_it_runs_orthorank(server: Server) -> None:
    assert "OrthoRank is active: ratio 0.222" in server.logs()
    completion(server.url, {"prompt": "one two three " * 100, "max_tokens": 1}, KEY)
    assert server.metric("orthorank_active") == 1
    assert server.metric("orthorank_token_updates_skipped_total") > 0


@pytest.mark.parametrize("key", [None, "wrong"])
def test_without_its_key_it_answers_401(server: Server, key: str | None) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        completion(server.url, {"prompt": "Hi", "max_tokens": 1}, key)
    assert raised.value.code == 401


def test_the_key_is_in_neither_log_nor_image(server: Server, image: str) -> None:
    assert KEY not in server.logs()
    assert KEY not in podman("image", "inspect", image)


def test_its_labels_say_what_it_is_and_not_what_its_base_is(image: str) -> None:
    labels = json.loads(podman("image", "inspect", "-f", "{{json .Labels}}", image))
    said = {name.removeprefix("org.opencontainers.image."): text for name, text in labels.items()}
    assert said["title"] == "orthorank-vllm"
    assert said["version"] == VERSION
    assert said["licenses"] == "Apache-2.0"
    assert said["base.name"] == BASE
    assert said["revision"] == REVISION
    assert said["created"] == ""


def test_it_is_user_2000_without_rights(server: Server) -> None:
    assert inside(server, "id", "-u") == "2000"
    assert inside(server, "id", "-g") == "0"
    status = dict(
        line.split(":\t", 1) for line in inside(server, "cat", "/proc/1/status").splitlines()
    )
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"


def test_only_its_caches_are_writable(server: Server) -> None:
    writable = "for d in / /home/vllm /opt/venv /models/six /home/vllm/.cache /tmp; do "
    writable += "touch $d/x 2>/dev/null && { rm $d/x; echo $d; }; done; true"
    assert inside(server, "sh", "-c", writable).split() == ["/home/vllm/.cache", "/tmp"]


def test_compiled_graphs_are_kept_with_its_caches(server: Server) -> None:
    kept = inside(server, "sh", "-c", "ls /home/vllm/.cache/vllm/torch_compile_cache")
    assert kept


def test_its_health_check_succeeds(server: Server) -> None:
    podman("healthcheck", "run", server.name)


def test_it_finishes_a_running_completion_when_told_to_stop(server: Server) -> None:
    """Last in the file: it ends the server.

    Break seen: without vLLM's `--shutdown-timeout` the stream breaks off.
    """
    tokens = 300
    body = {"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    events: list[str] = []
    with post(server.url, body, KEY) as stream:
        events.append(stream.readline().decode())
        started = time.monotonic()
        stopping = threading.Thread(
            target=podman, args=("stop", "--time", str(STOP_SECONDS), server.name)
        )
        stopping.start()
        events += [line.decode() for line in stream]
    stopping.join()
    chunks = [line.removeprefix("data: ").strip() for line in events if line.startswith("data: ")]
    assert chunks[-1] == "[DONE]"
    assert json.loads(chunks[-2])["choices"][0]["finish_reason"] == "length"
    assert time.monotonic() - started < STOP_SECONDS
    state = json.loads(podman("inspect", "-f", "{{json .State}}", server.name))
    assert (state["Status"], state["ExitCode"]) == ("exited", 0)
    assert "mode=drain" in server.logs()
