"""Prefill time, decode time and memory: OrthoRank's server against stock vLLM's.

`python -m orthorank_vllm.bench.prefill MODEL` starts both servers, gives them the
same prompts in turns and compares pair by pair, so that a machine that becomes
slower or faster meanwhile does so for both. How far stock vLLM differs from itself,
measured the same way, says which differences mean anything.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from orthorank_vllm.bench.servers import Server, ServerError, get, resident_mb, running
from orthorank_vllm.bench.workloads import (
    DECODE_PROMPT,
    Spread,
    UsageError,
    Workload,
    alternate,
    plan_workloads,
    warm_up,
)

MIN_MODEL_LEN = 4096
UPDATES = "orthorank_token_updates_total"
SKIPPED = "orthorank_token_updates_skipped_total"


def context_length(model: str) -> int:
    """
    Raises:
        UsageError: the model's config cannot be read.
    """
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings)
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{model}: {' '.join(str(error).split())}") from None


def ratio_reached(server: Server) -> float:
    """The fraction of token updates that the server says it skipped.

    Raises:
        ServerError: it skipped nothing, so it is no OrthoRank server to be measured.
    """
    totals = {UPDATES: 0.0, SKIPPED: 0.0}
    for line in get(server, "/metrics").splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in totals:
            totals[name] += float(line.rpartition(" ")[2])
    if totals[SKIPPED] == 0:
        raise ServerError(f"{server.name}: /metrics shows nothing skipped: OrthoRank is inactive")
    return totals[SKIPPED] / sum(totals.values())


def measure(args: argparse.Namespace, workloads: Sequence[Workload], logs: Path) -> dict[str, Any]:
    """Run both servers, fill the workloads' times and return the other findings."""
    flags = [*args.common_flags, *args.vllm_args]
    with ExitStack() as stack:
        # OrthoRank first: it is the one that may refuse. One at a time: vLLM measures
        # the memory that is free while it starts.
        sparse_flags = [*flags, "--orthorank-ratio", str(args.ratio)]
        sparse = stack.enter_context(running("orthorank", args.model, sparse_flags, logs))
        stock = stack.enter_context(running("stock", args.model, flags, logs))
        tell("warming up")
        warm_up(workloads, [stock, sparse])
        ratio_reached(sparse)
        for workload in workloads:
            tell(f"noise, stock against stock: {workload.name}, {args.pairs} pairs")
            workload.noise = alternate(workload, args.pairs, stock, stock)
            tell(f"  ratios {format_range(Spread.of_noise(workload.noise))}")
        for workload in workloads:
            tell(f"stock against OrthoRank: {workload.name}, {args.pairs} pairs")
            workload.times = alternate(workload, args.pairs, stock, sparse)
        return {
            "ratio_reached": ratio_reached(sparse),
            "resident_mb": {server.name: resident_mb(server) for server in (stock, sparse)},
        }


def tell(text: str) -> None:
    """Progress goes to stderr: stdout is the report."""
    print(text, file=sys.stderr, flush=True)


def format_range(spread: Spread) -> str:
    return f"{spread.minimum:.3f} to {spread.maximum:.3f}"


def median_speed(workload: Workload, column: int) -> float:
    return workload.tokens / statistics.median(pair[column] for pair in workload.times)


def format_row(workload: Workload) -> str:
    ratio, noise = Spread.of(workload.times), Spread.of_noise(workload.noise)
    cells = [
        workload.name,
        f"{median_speed(workload, 0):.1f}",
        f"{median_speed(workload, 1):.1f}",
        f"{ratio.median:.3f}",
        f"{ratio.low_quartile:.3f} to {ratio.high_quartile:.3f}",
        format_range(ratio),
        format_range(noise),
        ratio.against(noise),
    ]
    return f"| {' | '.join(cells)} |"


def report(args: argparse.Namespace, workloads: Sequence[Workload], found: dict[str, Any]) -> str:
    """The Markdown that goes to stdout."""
    machine = describe_machine()
    stock, sparse = found["resident_mb"]["stock"], found["resident_mb"]["orthorank"]
    head = ["workload", "stock tokens/s", "OrthoRank tokens/s", "stock / OrthoRank time: median"]
    head += ["quartiles", "min to max", "noise (stock / stock)", "verdict"]
    return "\n".join(
        [
            f"vLLM {machine['vllm']}, {machine['cpu']}, {machine['cores']} cores; ratio "
            f"{found['ratio_reached']:.3f} reached (asked for {args.ratio:g}); {args.pairs} pairs",
            "",
            f"| {' | '.join(head)} |",
            f"|{'---|' * len(head)}",
            *(format_row(workload) for workload in workloads),
            "",
            f"Resident memory: stock {stock:.0f} MB, OrthoRank {sparse:.0f} MB, "
            f"difference {sparse - stock:+.0f} MB",
        ]
    )


def describe_machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    return {"vllm": version("vllm"), "cpu": cpu, "cores": os.cpu_count()}


def as_json(args: argparse.Namespace, workloads: Sequence[Workload], found: dict[str, Any]) -> str:
    rows = [
        {
            "name": workload.name,
            "noise_seconds": workload.noise,
            "noise_ratio": asdict(Spread.of_noise(workload.noise)),
            "seconds": workload.times,
            "ratio": asdict(Spread.of(workload.times)),
        }
        for workload in workloads
    ]
    everything = {"options": vars(args), **describe_machine(), **found, "workloads": rows}
    return json.dumps(everything, indent=1)


class Parser(argparse.ArgumentParser):
    """argparse, with mistakes told in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m orthorank_vllm.bench.prefill", description=__doc__)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--ratio", type=float, default=0.3, help="OrthoRank's ratio (0.3)")
    parser.add_argument("--lengths", default="512,2048", help="prompt lengths (512,2048)")
    parser.add_argument("--pairs", type=int, default=12, help="pairs for each row (12)")
    parser.add_argument("--output-len", type=int, default=64, help="tokens to decode (64)")
    parser.add_argument("--text", help="file to cut prompts from (Python's help topics)")
    parser.add_argument("--json", help="file for all times and settings")
    parser.add_argument(
        "--vllm-args",
        default="",
        help="more options for both servers, as --vllm-args='--enforce-eager'; on a GPU both "
        "must fit: --vllm-args='--gpu-memory-utilization 0.4'",
    )
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work, and complete the arguments.

    Raises:
        UsageError: names the argument.
    """
    given = args.lengths
    try:
        args.lengths = [int(length) for length in given.split(",")]
    except ValueError:
        raise UsageError(f"--lengths {given}: give whole numbers, such as 512,2048") from None
    try:
        args.vllm_args = shlex.split(args.vllm_args)
        on_cpu = "cpu" in version("vllm")
    except ValueError as error:
        raise UsageError(f"--vllm-args {args.vllm_args}: {error}") from None
    except PackageNotFoundError:
        raise UsageError("vLLM is not installed in this environment") from None
    if args.pairs < 1:
        raise UsageError(f"--pairs {args.pairs}: give at least 1")
    if not 0 < args.ratio < 1:
        raise UsageError(f"--ratio {args.ratio:g}: give a number above 0 and below 1")
    if args.output_len < 2:
        raise UsageError(f"--output-len {args.output_len}: give at least 2")
    if not Path(args.model, "config.json").is_file():
        raise UsageError(f"{args.model}: no model folder (it has no config.json)")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: its folder does not exist")
    context = context_length(args.model)
    longest = max(*args.lengths, DECODE_PROMPT + args.output_len - 1) + 1
    if min(args.lengths) < 1 or longest > context:
        raise UsageError(
            f"--lengths {given} --output-len {args.output_len}: the "
            f"model's context is {context} tokens, for the prompt and at least one token more"
        )
    args.common_flags = ["--max-model-len", str(min(context, max(longest, MIN_MODEL_LEN)))]
    # vLLM tells its CPU build by the version too; most CPUs are slow in the models' bfloat16.
    args.common_flags += ["--dtype", "float32"] if on_cpu else []


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        args = parse_arguments()
        check(args)
        workloads = plan_workloads(args.model, args.text, args.lengths, args.output_len, args.pairs)
        logs = Path(tempfile.mkdtemp(prefix="orthorank-bench-"))
        tell(f"the servers' logs are in {logs}")
        found = measure(args, workloads, logs)
    except UsageError as error:
        tell(f"error: {error}")
        return 2
    except ServerError as error:
        tell(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        tell("interrupted; both servers are stopped")
        return 130
    print(report(args, workloads, found))
    if args.json:
        Path(args.json).write_text(as_json(args, workloads, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
