"""vLLM's own commands with the plugin installed: as without it, and with OrthoRank where asked."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripts import Script

pytestmark = pytest.mark.model

# vLLM's program, imported once; each run is a process of its own, forked before anything is set up.
# It tells what each printed, log and all, and how it ended; and for what it says about itself, each
# command's help by its words.
PROGRAM = r"""
import contextlib, io, multiprocessing, os, re, tempfile
import vllm.entrypoints.cli.benchmark.main, vllm.entrypoints.cli.run_batch
import vllm.entrypoints.cli.serve, vllm.v1.engine.core, vllm.v1.worker.cpu_worker
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

def run(words, plugins, descriptor):
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if plugins is not None:
        os.environ["VLLM_PLUGINS"] = plugins
    if words:
        sys.argv = ["vllm", *words]
        main()
    else:
        print(json.dumps(help_of()))

ended = []
for words, plugins in arguments:
    with tempfile.TemporaryFile() as output:
        process = multiprocessing.get_context("fork").Process(
            target=run, args=(words, plugins, output.fileno())
        )
        process.start()
        process.join(300)
        process.kill()
        output.seek(0)
        ended.append((process.exitcode, output.read().decode()))
answer(ended)
"""
WITH_ORTHORANK = {"serve", "run-batch", "bench latency", "bench throughput", "bench startup"}
ON = ("--orthorank-ratio", "0.2", "--orthorank-layers", "2,4")
SMALL = ("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4", "--dtype", "float32")
BENCHMARKS = {
    "latency": "--batch-size 2 --num-iters-warmup 0 --num-iters 1 --input-len 96 --output-len 4",
    "throughput": "--num-prompts 2 --dataset-name random --random-input-len 96"
    " --random-output-len 4",
}


@dataclass
class Run:
    """One run of the program: its exit status, and all that it printed, its log among it."""

    status: int
    output: str

    @property
    def is_on(self) -> bool:
        """Whether it was one with OrthoRank; it has to have gone well."""
        assert self.status == 0, self.output[-4000:]
        assert "Traceback" not in self.output
        return "OrthoRank is active: ratio 0.222 (asked for 0.2)" in self.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("batch")


@pytest.fixture(scope="module")
def runs(small_model_path: str, folder: Path) -> dict[str, Run]:
    """All of them, by name."""
    body = {"model": small_model_path, "max_tokens": 4}
    body |= {"messages": [{"role": "user", "content": "Name three colours. " * 20}]}
    request = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (folder / "asked.jsonl").write_text(json.dumps(request) + "\n")
    model = ("--model", small_model_path, *SMALL)
    batch = ("-i", str(folder / "asked.jsonl"), "-o", str(folder / "answered.jsonl"))
    commands: dict[str, tuple[str, ...]] = {"stock's help": (), "help": ()}
    for name, words in BENCHMARKS.items():
        commands[name] = ("bench", name, *words.split(), *model)
        commands[f"{name}, on"] = (*commands[name], *ON)
    commands["mistaken"] = (*commands["latency"], "--orthorank-layers", "9")
    commands["run-batch"] = ("run-batch", *batch, *model, *ON)
    plugins = {"stock's help": ""}
    script = Script(
        PROGRAM,
        *((words, plugins.get(name)) for name, words in commands.items()),
        VLLM_LOGGING_LEVEL="INFO",
    )
    return {name: Run(*ended) for name, ended in zip(commands, script.answer, strict=True)}


def test_every_command_has_its_own_help_and_ours_beside_it(runs: dict[str, Run]) -> None:
    """Break seen: flags for the server's arguments alone."""
    stock: dict[str, Any]
    told: dict[str, Any]
    stock, told = (
        json.loads(runs[name].output.splitlines()[-1]) for name in ("stock's help", "help")
    )
    assert told.keys() == stock.keys() >= {*WITH_ORTHORANK, "chat", "complete", "collect-env"}
    assert [status for status, _ in told.values()] == [0] * len(told)
    for command, (_, text) in told.items():
        lines, stock_lines = text.splitlines(), stock[command][1].splitlines()
        ours = [line for line in lines if line not in stock_lines]
        assert [line for line in lines if line not in ours] == stock_lines
        assert not ours or "orthorank" in ours[0].lower()
    with_orthorank = {command for command, (_, text) in told.items() if "OrthoRank" in text}
    assert with_orthorank >= WITH_ORTHORANK


@pytest.mark.parametrize("is_on", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_vllms_benchmarks_run(runs: dict[str, Run], name: str, is_on: bool) -> None:
    """Break seen: an attribute of ours on the arguments, which these copy field by field."""
    run = runs[f"{name}, on" if is_on else name]
    assert run.is_on == is_on
    assert re.search(r"Avg latency: \d|Throughput: \d", run.output)


def test_a_mistake_in_a_benchmarks_options_is_one_line(runs: dict[str, Run]) -> None:
    """Although the benchmark makes arguments of its own from those of the command line."""
    run = runs["mistaken"]
    assert run.status == 2
    assert "Traceback" not in run.output
    assert run.output.splitlines()[-1] == (
        "vllm: error: --orthorank-layers 9: not allowed, this model has layers 0 to 5"
    )


def test_a_batch_of_requests_is_answered(runs: dict[str, Run], folder: Path) -> None:
    assert runs["run-batch"].is_on
    [answer] = map(json.loads, (folder / "answered.jsonl").read_text().splitlines())
    assert answer["response"]["status_code"] == 200
