"""vLLM's own commands with the plugin installed: as without it, and with OrthoRank where asked."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripts import Script

pytestmark = pytest.mark.model

# What vLLM says about itself: each command's help, by its words, and the exit status.
HELP = r"""
import contextlib, io, re
from vllm.entrypoints.cli.main import main
def help_of(*words):
    sys.argv = ["vllm", *words, "--help"]
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        try:
            main()
            status = None
        except SystemExit as ended:
            status = ended.code
    found = {" ".join(words): [status, told.getvalue()]}
    for names in re.findall(r"^  \{([\w,-]+)\}", told.getvalue(), re.MULTILINE):
        for name in names.split(","):
            found |= help_of(*words, name)
    return found
answer(help_of())
"""
WITH_ORTHORANK = {"serve", "run-batch", "bench latency", "bench throughput", "bench startup"}
ON = ("--orthorank-ratio", "0.2", "--orthorank-layers", "2,4")
SMALL = ("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4", "--dtype", "float32")


def vllm(*words: str) -> subprocess.CompletedProcess[str]:
    """One run, its output and its log together; the engine in the same process where that goes."""
    return subprocess.run(
        [Path(sys.executable).parent / "vllm", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO"},
    )


def is_on(run: subprocess.CompletedProcess[str]) -> bool:
    """Whether a run that went well was one with OrthoRank."""
    assert run.returncode == 0, run.stdout[-4000:]
    assert "Traceback" not in run.stdout
    return "OrthoRank is active: ratio 0.222 (asked for 0.2)" in run.stdout


def test_every_command_has_its_own_help_and_ours_beside_it() -> None:
    """Break seen: flags for the server's arguments alone."""
    stock: dict[str, Any] = Script(HELP, VLLM_PLUGINS="").answer
    told: dict[str, Any] = Script(HELP).answer
    assert told.keys() == stock.keys() >= {*WITH_ORTHORANK, "chat", "complete", "collect-env"}
    assert [status for status, _ in told.values()] == [0] * len(told)
    for command, (_, text) in told.items():
        lines, stock_lines = text.splitlines(), stock[command][1].splitlines()
        ours = [line for line in lines if line not in stock_lines]
        assert [line for line in lines if line not in ours] == stock_lines
        assert not ours or "orthorank" in ours[0].lower()
    with_orthorank = {command for command, (_, text) in told.items() if "OrthoRank" in text}
    assert with_orthorank >= WITH_ORTHORANK


@pytest.mark.parametrize("options", [(), ON], ids=["off", "on"])
@pytest.mark.parametrize(
    "words",
    [
        "latency --batch-size 2 --num-iters-warmup 0 --num-iters 1 --input-len 64 --output-len 4",
        "throughput --num-prompts 2 --dataset-name random --random-input-len 64"
        " --random-output-len 4",
    ],
    ids=["latency", "throughput"],
)
def test_vllms_benchmarks_run(small_model_path: str, words: str, options: tuple[str, ...]) -> None:
    """Break seen: an attribute of ours on the arguments, which these copy field by field."""
    run = vllm("bench", *words.split(), "--model", small_model_path, *SMALL, *options)
    assert is_on(run) == bool(options)
    assert re.search(r"Avg latency: \d|Throughput: \d", run.stdout)


def test_a_mistake_in_a_benchmarks_options_is_one_line(small_model_path: str) -> None:
    """Although the benchmark makes arguments of its own from those of the command line."""
    run = vllm("bench", "latency", "--model", small_model_path, *SMALL, "--orthorank-layers", "9")
    assert run.returncode == 2
    assert "Traceback" not in run.stdout
    assert run.stdout.splitlines()[-1] == (
        "vllm: error: --orthorank-layers 9: not allowed, this model has layers 0 to 5"
    )


def test_a_batch_of_requests_is_answered(small_model_path: str, tmp_path: Path) -> None:
    asked, answered = tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    body = {"model": small_model_path, "max_tokens": 4}
    body |= {"messages": [{"role": "user", "content": "Name three colours."}]}
    request = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    asked.write_text(json.dumps(request) + "\n")
    run = vllm(
        *("run-batch", "-i", str(asked), "-o", str(answered), "--model", small_model_path),
        *(*SMALL, *ON),
    )
    assert is_on(run)
    [answer] = map(json.loads, answered.read_text().splitlines())
    assert answer["response"]["status_code"] == 200
