"""Python in a process of its own: vLLM's distributed state does not outlive an engine's."""

import json
import os
import subprocess
import sys
from typing import Any

from tests.conftest import ROOT

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
        )
        self._output: str | None = None

    @property
    def output(self) -> str:
        if self._output is None:
            self._output, _ = self._process.communicate()
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
