"""Measure what a ratio gains in speed, against stock vLLM or a pruned model.

Starts the servers as a user would, sends all of them the same prompts in turn over HTTP, and
compares pair by pair, so that a machine that becomes slower or faster does so for each.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from orthorank_vllm import __version__
from orthorank_vllm.bench.args import BenchArgs, add_arguments
from orthorank_vllm.bench.paired_stats import Round, measure_rounds
from orthorank_vllm.bench.pruned_checkpoint import write_pruned
from orthorank_vllm.bench.report import OURS, Comparison, Results, plot, table
from orthorank_vllm.bench.servers import Server, ServerError, get, memory_of, running
from orthorank_vllm.bench.workloads import Prompt, Prompts, Workload, plan_workloads
from orthorank_vllm.files import write_output
from orthorank_vllm.flops import Shapes
from orthorank_vllm.metrics.status import EngineStatus, engines_of
from orthorank_vllm.options import OptionError

__all__ = ["add_arguments", "run"]

WARM_UPS = 2
MIN_MODEL_LEN = 4096
# A vLLM worker in a process of its own (as on a CPU) spins for 1 s after a request, on a
# core that the other server's request would then lack.
SETTLE_SECONDS = 1.2


def run(arguments: argparse.Namespace) -> int:
    """Measure, and write what was measured; returns the exit status.

    Raises:
        OptionError: see the options.
    """
    from orthorank_vllm.offline.workers import model_config_of, tokenizer_of

    args = BenchArgs.of(arguments)
    model_config = model_config_of(arguments)
    shapes = Shapes.of(model_config.hf_text_config)
    workloads = plan_workloads(args.lengths, args.clients, args.output_len)
    flags = [*_default_flags(args, workloads, int(model_config.max_model_len)), *args.flags]
    tokens = tokenizer_of(model_config).encode(args.text.content)
    results = Results(args.model, flags, shapes, _machine())
    try:
        for ratio in args.ratios:
            # Drawn before any server starts: a text that is too short shows at once.
            prompts = Prompts(tokens)
            drawn = [
                [workload.draw(prompts) for _ in range(WARM_UPS + args.pairs)]
                for workload in workloads
            ]
            results.comparisons.append(
                _compare(args, ratio, shapes.layers, flags, workloads, drawn)
            )
            write_output(args.folder / "results.json", results.as_json())
    except ServerError as error:
        print(f"orthorank bench: error: {error}", file=sys.stderr)
        return 1
    print(table(results))
    written = ["results.json"]
    if picture := plot(results):
        write_output(args.folder / "plot.svg", picture)
        written.append("plot.svg")
    else:
        print(
            "note: no plot without matplotlib; pip install 'orthorank-vllm[evaluate]'",
            file=sys.stderr,
        )
    print(f"wrote {' and '.join(written)} in {args.folder}")
    return 0


def _compare(
    args: BenchArgs,
    ratio: Any,
    layers: int,
    flags: Sequence[str],
    workloads: Sequence[Workload],
    drawn: Sequence[Sequence[Sequence[Prompt]]],
) -> Comparison:
    """Every workload on OrthoRank and its rivals, all of them running at the same time."""
    with ExitStack() as stack:
        # OrthoRank first: it is the one that may refuse. One after another: vLLM measures the
        # memory that is free while it starts.
        sparse_flags = [*flags, "--orthorank-ratio", str(ratio), *args.rule_flags]
        servers = [stack.enter_context(running(OURS, args.model, sparse_flags, args.folder))]
        runs = _engines(servers[0])[0]
        configured = runs.ratio_configured or 0.0
        removed = 0
        for rival in args.rivals:
            model = args.model
            if rival == "prune":
                removed = max(round(configured * layers), 1)
                model = stack.enter_context(tempfile.TemporaryDirectory(prefix="orthorank-pruned-"))
                write_pruned(Path(args.model), Path(model), removed)
            servers.append(stack.enter_context(running(rival, model, flags, args.folder)))
        rounds = _measure(servers, workloads, drawn, args.pairs)
        return Comparison(
            ratio_asked=ratio,
            ratio_configured=configured,
            ratio=_ratio_reached(servers[0]),
            layers=runs.layers,
            window=runs.window or 0,
            tail=runs.tail or 0,
            removed=removed,
            workloads=list(workloads),
            rounds=rounds,
            memory={server.name: memory_of(server) for server in servers},
        )


def _measure(
    servers: Sequence[Server],
    workloads: Sequence[Workload],
    drawn: Sequence[Sequence[Sequence[Prompt]]],
    pairs: int,
) -> list[list[Round]]:
    """Rounds by workload."""
    total = len(workloads) * len(servers) * (WARM_UPS + pairs)
    found = []
    with tqdm(total=total, unit="measurements", desc="warming up") as bar:
        for workload, prompts in zip(workloads, drawn, strict=True):
            for group in prompts[:WARM_UPS]:
                for server in servers:
                    workload.measure(server, group)
                    bar.update()
        _ratio_reached(servers[0])
        for workload, prompts in zip(workloads, drawn, strict=True):
            bar.set_description(workload.name)
            measures = [
                (server.name, partial(_timed, workload, server, prompts[WARM_UPS:]))
                for server in servers
            ]
            found.append(measure_rounds(measures, pairs, bar.update))
    return found


def _timed(
    workload: Workload, server: Server, prompts: Sequence[Sequence[Prompt]], number: int
) -> float:
    time.sleep(SETTLE_SECONDS)
    return workload.measure(server, prompts[number])


def _engines(server: Server) -> list[EngineStatus]:
    """What the server's engines say of themselves.

    Raises:
        ServerError: they run no selective layers, so this is no server to be measured.
    """
    engines = engines_of(text_string_to_metric_families(get(server, "/metrics")))
    if not engines or not all(engine.active and engine.layers for engine in engines):
        raise server.failure("/metrics shows no selective layers: OrthoRank is inactive there")
    return engines


def _ratio_reached(server: Server) -> float:
    """The fraction of token updates that the server says it skipped.

    Raises:
        ServerError: it skipped nothing.
    """
    engines = _engines(server)
    skipped = sum(engine.token_updates_skipped for engine in engines)
    if not skipped:
        raise ServerError(f"{server.name}: /metrics shows nothing skipped of these prompts")
    return skipped / (skipped + sum(engine.token_updates for engine in engines))


def _default_flags(args: BenchArgs, workloads: Sequence[Workload], context: int) -> list[str]:
    """What the user would have to give for a sensible comparison, unless it was given.

    Raises:
        OptionError: the model's context is too short.
    """
    longest = max(workload.prompt_len + workload.outputs for workload in workloads)
    if longest > context:
        raise OptionError(
            f"--lengths {','.join(map(str, args.lengths))}: with what is generated a request has "
            f"{longest} tokens, and this model's context is {context}; give shorter ones"
        )
    flags = []
    if not _is_given("max-model-len", args.flags):
        flags += ["--max-model-len", str(min(context, max(longest, MIN_MODEL_LEN)))]
    # vLLM tells its CPU build by the version too; most CPUs are slow in the models' bfloat16.
    if "cpu" in version("vllm") and not _is_given("dtype", args.flags):
        flags += ["--dtype", "float32"]
    return flags


def _is_given(name: str, flags: Sequence[str]) -> bool:
    names = {flag.partition("=")[0].replace("_", "-") for flag in flags}
    return f"--{name}" in names


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "gpus": devices,
        "vllm": version("vllm"),
        "torch": torch.__version__,
        "orthorank-vllm": __version__,
    }
