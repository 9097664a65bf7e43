"""One part of the check, in a process of its own: `python -m orthorank_vllm.device_check.part`.

So a part that dies, or that leaves the device in a bad state, leaves the others alone.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orthorank_vllm.device_check import kernel, model, shapes, speed
from orthorank_vllm.device_check.findings import Finding, Speed
from orthorank_vllm.files import write_whole

ANSWER = "answer.json"
# Of a folder to write in and a deadline of `time.monotonic`: what was found, as it is found.
Part = Callable[[Path, float], Iterator[Finding | Speed]]


def check_kernel(folder: Path, deadline: float) -> Iterator[Finding | Speed]:
    """The kernel alone."""
    yield from kernel.check("cuda")


def check_family(family: str, **options: Any) -> Part:
    """A small model of a family; the options are vLLM's."""

    def check(folder: Path, deadline: float) -> Iterator[Finding | Speed]:
        written = shapes.write_small(family, folder / "model")
        yield from model.check_model(
            str(written), "cuda", "bfloat16", gpu_memory_utilization=0.3, **options
        )

    return check


def measure_speed(folder: Path, deadline: float) -> Iterator[Finding | Speed]:
    """Llama 3 8B's shapes."""
    written = shapes.write_large(folder / "model")
    ways = ("gather", "triton")
    # The two engines share the memory; all else is vLLM's default.
    contest = speed.Contest(written, speed.LENGTHS, ways, deadline, gpu_memory_utilization=0.42)
    for length in speed.LENGTHS:
        yield contest.prefill(length)
    for batch in speed.BATCHES:
        yield contest.decode(batch)


# In the order in which they run: the shortest first.
PARTS: dict[str, Part] = {
    "kernel": check_kernel,
    "llama": check_family("Llama"),
    "fp8": check_family("Llama", kv_cache_dtype="fp8", enforce_eager=True),
    "mixtral": check_family("Mixtral", enforce_eager=True),
    "speed": measure_speed,
}


def main() -> None:
    """Arguments: the part's name, its folder, and the seconds that it has."""
    name, folder, seconds = sys.argv[1:]
    answer: dict[str, list[dict[str, Any]]] = {"findings": [], "speeds": []}
    for found in PARTS[name](Path(folder), time.monotonic() + float(seconds)):
        answer["findings" if isinstance(found, Finding) else "speeds"].append(asdict(found))
        # Whatever becomes of the rest.
        write_whole(Path(folder) / ANSWER, json.dumps(answer))


if __name__ == "__main__":
    main()
