"""One part of the check, in a process of its own: `python -m orthorank_vllm.device_check.part`.

So a part that dies, or that leaves the device in a bad state, leaves the others alone.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orthorank_vllm.device_check import kernel, model, shapes, speed

Answer = dict[str, list[dict[str, Any]]]


def check_kernel(folder: Path, deadline: float) -> Answer:
    """The kernel alone."""
    return {"findings": [asdict(finding) for finding in kernel.check("cuda")]}


def check_family(family: str, **options: Any) -> Callable[[Path, float], Answer]:
    """A small model of a family; the options are vLLM's."""

    def check(folder: Path, deadline: float) -> Answer:
        written = shapes.write_small(family, folder / "model")
        found = model.check_model(
            str(written), "cuda", "bfloat16", gpu_memory_utilization=0.3, **options
        )
        return {"findings": [asdict(finding) for finding in found]}

    return check


def measure_speed(folder: Path, deadline: float) -> Answer:
    """Llama 3 8B's shapes."""
    written = shapes.write_large(folder / "model")
    ways = ("gather", "triton")
    contest = speed.Contest(
        written, speed.LENGTHS, ways, deadline, gpu_memory_utilization=0.42, max_num_seqs=64
    )
    speeds = [contest.prefill(length) for length in speed.LENGTHS]
    speeds += [contest.decode(batch) for batch in speed.BATCHES]
    return {"speeds": [asdict(found) for found in speeds]}


# In the order in which they run: the shortest first.
PARTS: dict[str, Callable[[Path, float], Answer]] = {
    "kernel": check_kernel,
    "llama": check_family("Llama"),
    "fp8": check_family("Llama", kv_cache_dtype="fp8", enforce_eager=True),
    "mixtral": check_family("Mixtral", enforce_eager=True),
    "speed": measure_speed,
}


def main() -> None:
    """Arguments: the part's name, its folder, and the seconds that it has."""
    name, folder, seconds = sys.argv[1:]
    answer = PARTS[name](Path(folder), time.monotonic() + float(seconds))
    (Path(folder) / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
