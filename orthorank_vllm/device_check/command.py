"""Check OrthoRank on this machine's GPU: whether it is right there, then how fast it is.

Needs no model and no network: it makes small models with random weights, and Llama 3 8B's shapes.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orthorank_vllm import __version__
from orthorank_vllm.cli.args import parse_count
from orthorank_vllm.device_check.findings import Finding, Speed, all_hold, findings_of, table
from orthorank_vllm.files import check_writable, write_output
from orthorank_vllm.options import OptionError

TAKES_MODEL = False
PARTS = ("kernel", "llama", "fp8", "mixtral", "speed")
# Of all parts: with the start of five processes, less than ten minutes.
DEFAULT_SECONDS = 570
LAST_LINES = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parts",
        default=",".join(PARTS),
        help="What to do, in this order whatever is given (default: all, %(default)s).",
    )
    parser.add_argument(
        "--seconds", default=str(DEFAULT_SECONDS), help="Time for all of it (default: %(default)s)."
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        default="orthorank-device-check",
        help="Folder for results.json and the parts' logs (default: %(default)s).",
    )


def run(arguments: argparse.Namespace) -> int:
    """
    Raises:
        OptionError: an option that cannot be, or a machine without a GPU.
    """
    parts = _parts_of(arguments.parts)
    seconds = parse_count("--seconds", arguments.seconds, least=60)
    folder = Path(arguments.output)
    check_writable(folder / "results.json")
    device = _device()
    deadline = time.monotonic() + seconds
    findings: dict[str, list[Finding]] = {}
    speeds: list[Speed] = []
    failures: dict[str, str] = {}
    took: dict[str, float] = {}
    for part in parts:
        print(f"{part} …", flush=True)
        start = time.monotonic()
        answer, failure = _run_part(part, folder / f"{part}.log", deadline - start)
        took[part] = time.monotonic() - start
        if failure is not None:
            failures[part] = failure
        if found := findings_of(answer["findings"]):
            findings[part] = found
        speeds += [Speed(**speed) for speed in answer["speeds"]]
        # Whatever comes later, this is kept.
        results = _results(device, findings, speeds, failures, took)
        write_output(folder / "results.json", results)
    print(f"\n{device}, vLLM {version('vllm')}, orthorank-vllm {__version__}\n")
    print(table(findings, speeds, failures))
    print(f"wrote results.json and the parts' logs in {folder}")
    return 0 if all_hold(findings, failures) else 1


def _parts_of(value: str) -> list[str]:
    named = {name.strip() for name in value.split(",")}
    for name in named:
        if name not in PARTS:
            raise OptionError(
                f"--parts {value}: {name or 'nothing'} is not known; give some of "
                f"{', '.join(PARTS)}"
            )
    return [part for part in PARTS if part in named]


def _device() -> str:
    import torch

    if not torch.cuda.is_available() or torch.version.hip:
        raise OptionError(
            f"this machine has no NVIDIA GPU that torch {torch.__version__} can use; there is "
            "nothing to check"
        )
    return torch.cuda.get_device_name()


def _run_part(part: str, log: Path, seconds: float) -> tuple[dict[str, Any], str | None]:
    """What a part found, and why that is not all, if it is not."""
    answer: dict[str, Any] = {"findings": [], "speeds": []}
    if seconds <= 0:
        return answer, "no time was left; give more --seconds"
    environment = {
        **os.environ,
        # A function is called in the workers, and the small models' engines are looked into.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if part == "speed" else "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    with tempfile.TemporaryDirectory(prefix="orthorank-check-") as folder, log.open("w") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "orthorank_vllm.device_check.part"),
                *(part, folder, str(seconds)),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        failure = None
        try:
            if process.wait(timeout=seconds) != 0:
                failure = _last_words(log)
        except subprocess.TimeoutExpired:
            failure = f"not done when the time was over; see {log}"
        finally:
            _end(process)
        found = Path(folder) / "answer.json"
        if found.exists():
            answer = json.loads(found.read_text())
    return answer, failure


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The part, and the engines that it may have left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    told = [line for line in lines[-LAST_LINES:] if "Error" in line or "error" in line]
    reason = told[-1] if told else next((line for line in reversed(lines) if line), "no output")
    return f"{reason[:200].replace('|', '/')}; see {log}"


def _results(
    device: str,
    findings: dict[str, list[Finding]],
    speeds: list[Speed],
    failures: dict[str, str],
    took: dict[str, float],
) -> str:
    return json.dumps(
        {
            "device": device,
            "versions": {name: version(name) for name in ("vllm", "torch", "triton")}
            | {"orthorank-vllm": __version__, "python": platform.python_version()},
            "findings": {
                part: [{**asdict(f), "holds": f.holds} for f in found]
                for part, found in findings.items()
            },
            "speeds": [asdict(speed) for speed in speeds],
            "failures": failures,
            "seconds": took,
        },
        indent=1,
    )
