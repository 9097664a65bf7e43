"""Python in a process of its own: vLLM's distributed state does not outlive an engine's."""

import json
import os
import signal
import subprocess
import sys
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


class Script:
    """One run of some code.

    `answers`: what it gave to `answer()`; `output`: all that it printed.
    """

    def __init__(self, code: str, *arguments: Any, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", HEADER + code, json.dumps(arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        self._output: str | None = None

    @property
    def output(self) -> str:
        if self._output is None:
            try:
                self._output, _ = self._process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired as hang:
                # Its workers too: they hold on to the pipe.
                os.killpg(self._process.pid, signal.SIGKILL)
                self._output, _ = self._process.communicate()
                raise AssertionError(f"a hang of {SECONDS} s: {self._output[-4000:]}") from hang
        return self._output

    @property
    def exit_status(self) -> int:
        assert self.output is not None
        return self._process.returncode

    @property
    def answer(self) -> Any:
        found = [line.partition(ANSWER)[2] for line in self.output.splitlines() if ANSWER in line]
        assert found, self.output[-4000:]
        return json.loads(found[-1])
