"""The examples, run as their README says, on the real model's first six layers."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.conftest import ROOT
from tests.support.counting import skipped_of
from tests.support.servers import API_KEY, Server, serving
from tests.support.shipped import Shipped

EXAMPLES = ROOT / "examples"
# Six layers have no profile, so two are named, of which each keeps a third.
SPARSE = ("--orthorank-layers", "2,4")


def run(example: str, *arguments: str, said: str = "", **environment: str) -> str:
    """What an example prints; a failure of it is the test's."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / example, *arguments],
        input=said,
        capture_output=True,
        text=True,
        env={**os.environ, "OPENAI_API_KEY": API_KEY, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def servers(
    small_model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Server]]:
    """One with OrthoRank and one without, started at the same time."""
    with ExitStack() as running, ThreadPoolExecutor() as pool:

        def start(name: str, *options: str) -> Server:
            folder = tmp_path_factory.mktemp(name)
            started = serving(small_model_path, folder, "--enforce-eager", *options)
            return running.enter_context(started)

        yield [
            future.result()
            for future in (pool.submit(start, "sparse", *SPARSE), pool.submit(start, "stock"))
        ]


@pytest.fixture
def server(servers: list[Server]) -> Server:
    return servers[0]


@pytest.mark.model
def test_offline_answers_each_prompt(model_path: str) -> None:
    """With the shipped profile, of which the first six layers have none."""
    options = ("--dtype", "float32", "--enforce-eager")
    printed = run("offline.py", model_path, *options, VLLM_LOGGING_LEVEL="INFO")
    reached = Shipped.at(0.3).reached
    assert f"OrthoRank is active: ratio {reached:.3f} (asked for 0.3)" in printed
    assert len(re.findall(r"^'.+' -> '.+'$", printed, re.MULTILINE)) == 3


@pytest.mark.server
@pytest.mark.model
def test_the_openai_client_completes_and_tells_what_was_skipped(server: Server) -> None:
    printed = run("openai_client.py", "one two three " * 100, "--url", server.url)
    [told] = re.findall(r"(\d+) prompt tokens; prefill skipped (.*)% of", printed)
    tokens, skipped = int(told[0]), float(told[1])
    assert tokens > 200
    wanted = 2 * skipped_of(tokens, 1 / 3) / (6 * tokens)
    assert skipped == pytest.approx(100 * wanted, abs=0.05)


@pytest.mark.server
@pytest.mark.model
def test_a_chat_streams_each_answer_and_remembers(server: Server) -> None:
    said = "Say hello.\nAnd now goodbye.\n\nnot asked\n"
    before = server.metric("vllm:request_success_total", finished_reason="length")
    before += server.metric("vllm:request_success_total", finished_reason="stop")
    printed = run("chat_streaming.py", "--url", server.url, said=said)
    after = server.metric("vllm:request_success_total", finished_reason="length")
    after += server.metric("vllm:request_success_total", finished_reason="stop")
    assert len(re.findall(r"^\[first token after \d+\.\d+ s\]$", printed, re.MULTILINE)) == 2
    assert after - before == 2


@pytest.mark.server
@pytest.mark.model
def test_a_long_prompt_is_timed_on_both_servers(servers: list[Server]) -> None:
    sparse, stock = servers
    arguments = ("--tokens", "300", "--rounds", "2")
    computed = sparse.metric("orthorank_prefill_tokens_total")
    printed = run("long_prompt.py", "--url", sparse.url, "--stock", stock.url, *arguments)
    computed = sparse.metric("orthorank_prefill_tokens_total") - computed
    [tokens] = re.findall(r"^(\d+) prompt tokens, 2 pairs", printed)
    assert 200 < int(tokens) < 600
    assert re.search(r"^times as fast: \d+\.\d\d \(", printed, re.MULTILINE)
    # Each round is another prompt, also to the prefix cache.
    assert computed == pytest.approx(3 * int(tokens), rel=0.02)


@pytest.mark.server
@pytest.mark.model
def test_servers_that_are_mixed_up_are_not_compared(servers: list[Server]) -> None:
    sparse, stock = servers
    swapped = subprocess.run(
        [sys.executable, EXAMPLES / "long_prompt.py", "--url", stock.url, "--stock", sparse.url],
        capture_output=True,
        text=True,
        check=False,
    )
    assert swapped.returncode == 2
    assert f"--url: {stock.url} does not run OrthoRank" in swapped.stderr


def test_the_readme_names_each_example_and_its_options() -> None:
    text = (EXAMPLES / "README.md").read_text()
    files = {path.name for path in EXAMPLES.glob("*.py")}
    assert set(re.findall(r"\]\((\w+\.py)\)", text)) == files
    for name in files:
        options = set(
            re.findall(
                r"(?<=\s)--[a-z-]+",
                " ".join(re.findall(f"^.*examples/{name}.*$", text, re.MULTILINE)),
            )
        )
        known = {
            node.value
            for node in ast.walk(ast.parse((EXAMPLES / name).read_text()))
            if isinstance(node, ast.Constant) and str(node.value).startswith("--")
        }
        assert options <= known, name
