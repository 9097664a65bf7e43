"""Python in a process of its own: vLLM's distributed state does not outlive an engine's.

To import vLLM takes longer than most scripts: those that need no environment of their own are
forks of a process that has done so.
"""

import atexit
import json
import os
import signal
import sys
from multiprocessing import get_context
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from tests.conftest import ROOT

# A script may wait for its turn of the cores; more is a hang.
SECONDS = 800
# What a script prints this in front of is its answer.
ANSWER = "ANSWER"
HEADER = f"""
import json, sys
import tests.conftest
def answer(value):
    print("{ANSWER}" + json.dumps(value), flush=True)
arguments = json.loads(sys.argv[1])
"""
FORKS = get_context("forkserver")
# None of them starts a thread, which a fork would lack.
FORKS.set_forkserver_preload(
    [
        "transformers.models.llama",
        "vllm.entrypoints.llm",
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
        "orthorank_vllm.plugin",
        "tests.support.freeze",
    ]
)
FRESH = get_context("spawn")


class Script:
    """One run of some code.

    `answers`: what it gave to `answer()`; `output`: all that it printed.
    """

    def __init__(self, code: str, *arguments: Any, **environment: str) -> None:
        with NamedTemporaryFile("w+", prefix="script-", delete=False) as file:
            self._file = Path(file.name)
        # vLLM reads some variables when it is imported.
        context: Any = FRESH if environment else FORKS
        told = json.dumps(arguments)
        variables = {**os.environ, **environment}
        self._process = context.Process(target=_run, args=(code, told, variables, str(self._file)))
        self._process.start()
        self._output: str | None = None

    @property
    def output(self) -> str:
        if self._output is None:
            self._process.join(SECONDS)
            if is_hanging := self._process.is_alive():
                # Its workers too.
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.join()
            self._output = self._file.read_text(errors="replace")
            self._file.unlink()
            assert not is_hanging, f"a hang of {SECONDS} s: {self._output[-4000:]}"
        return self._output

    @property
    def exit_status(self) -> int:
        assert self.output is not None
        return int(self._process.exitcode)

    @property
    def answer(self) -> Any:
        found = [line.partition(ANSWER)[2] for line in self.output.splitlines() if ANSWER in line]
        assert found, self.output[-4000:]
        return json.loads(found[-1])


def _run(code: str, arguments: str, environment: dict[str, str], output: str) -> None:
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["-c", arguments]
    try:
        # Where what it defines is found by its workers, as in any program.
        exec(HEADER + code, vars(sys.modules["__main__"]))
    finally:
        # A program does so at its end, a process of multiprocessing does not.
        atexit._run_exitfuncs()
