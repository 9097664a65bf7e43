"""`orthorank calibrate` in a process of its own, and what it leaves and says."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.calibrate.small_sizes import SMALL_SIZES

OPTIONS = ["--dtype", "float32", "--samples", "1", "--max-ratio", "0.3", "--window", "32"]
# Nor is there room for a KV cache, and none is needed.
ALL_MEMORY = ["--gpu-memory-utilization", "1"]
# What the program does, on less text.
PROGRAM = f"import sys\nfrom orthorank_vllm.cli.main import main\n{SMALL_SIZES}\nsys.exit(main())"


def calibrate(model_path: str, *options: str, threads: int = 1) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "calibrate", model_path, *OPTIONS, *ALL_MEMORY, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As in a terminal, also where the tests run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def tried_in(progress: str) -> int:
    """How many sets were tried in the end."""
    return int(re.findall(r"(\d+) tried", progress)[-1])


def num_kept(path: Path) -> int:
    """How many sets a file of measurements has."""
    if not path.exists():
        return 0
    measured = json.loads(path.read_text())["measured"]
    return sum(len(each["known"]) for each in measured.values())
