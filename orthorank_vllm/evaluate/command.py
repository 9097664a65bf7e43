"""Measure what OrthoRank costs a model in quality, beside what saves as much.

Perplexity of a text and accuracy on tasks, dense and at each ratio, as a table, JSON and a report.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from orthorank_vllm.calibrate.command import (
    check_writable,
    measure,
    parse_count,
    parse_option,
    write,
)
from orthorank_vllm.calibrate.greedy import Choice
from orthorank_vllm.calibrate.measurement import (
    DEFAULT_LENGTH,
    DEFAULT_TOKENS,
    Measurement,
    found_so_far,
)
from orthorank_vllm.calibrate.text import BUILT_IN, Text, built_in_text, read_text
from orthorank_vllm.config import (
    DEFAULT_KEEP,
    DEFAULT_WINDOW,
    OptionError,
    parse_keep,
    parse_ratio,
    parse_window,
    selective_count,
)
from orthorank_vllm.evaluate.perplexity import cut, perplexity
from orthorank_vllm.evaluate.report import write_report
from orthorank_vllm.evaluate.results import Results, plan_runs
from orthorank_vllm.evaluate.scorer import Scorer
from orthorank_vllm.evaluate.tasks import TaskFile, accuracies, read_task
from orthorank_vllm.profiles import (
    Profile,
    ProfileError,
    find_profile,
    model_identity,
    read_profile,
)
from orthorank_vllm.treatment import METHODS, Treatment

DEFAULT_RATIOS = "0,0.1,0.2,0.3"
DEFAULT_AGAINST = "prune,random"
DEFAULT_SEGMENT = 1024
HEAT_MAP_TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--data", metavar="FILE", required=True, help='Text, or JSON lines with "text", to test on.'
    )
    group.add_argument(
        "--ratios", default=DEFAULT_RATIOS, help="0 is the dense model (default: %(default)s)."
    )
    others = ", ".join(f"{name} ({text})" for name, text in METHODS.items() if name != "orthorank")
    group.add_argument(
        "--against",
        default=DEFAULT_AGAINST,
        help=f"What to compare with, none or some of: {others} (default: %(default)s).",
    )
    group.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="FILE",
        help='JSON lines with "query", "choices", "gold" or "context", "continuation".',
    )
    group.add_argument("--limit", help="Questions of each task (default: all).")
    group.add_argument("--keep", default=DEFAULT_KEEP, help="As --orthorank-keep (default: 1/3).")
    group.add_argument(
        "--window", default=DEFAULT_WINDOW, help="As --orthorank-window (default: %(default)s)."
    )
    group.add_argument(
        "--length",
        default=DEFAULT_SEGMENT,
        help="Tokens of each segment of the text (default: %(default)s).",
    )
    group.add_argument(
        "--profile",
        metavar="FILE",
        help="The layers' order (default: the one that `vllm serve` would find).",
    )
    group.add_argument(
        "--calibration-data",
        metavar="FILE",
        help="The text to choose the layers to prune with; that of the profile, for a fair "
        f"comparison (default: {BUILT_IN}).",
    )
    group.add_argument("--breadth", help="As `orthorank calibrate --breadth`, for pruning.")
    group.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        default="orthorank-evaluation",
        help="Folder for results.json and report.html; a run that was stopped goes on from "
        "there (default: %(default)s).",
    )


@dataclass(frozen=True)
class Asked:
    """The options, checked."""

    text: Text
    ratios: list[float]
    methods: list[str]
    treatment: Treatment
    length: int
    tasks: list[TaskFile]
    limit: int | None
    calibration: Text
    breadth: int | None
    folder: Path

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Asked":
        """
        Raises:
            OptionError: the first option that cannot be.
        """
        given = arguments.calibration_data
        asked = cls(
            text=read_text(arguments.data),
            ratios=[parse_option("--ratios", parse_ratio, r) for r in arguments.ratios.split(",")],
            methods=["orthorank", *_parse_methods(arguments.against)],
            treatment=Treatment(
                keep=parse_option("--keep", parse_keep, arguments.keep),
                window=parse_option("--window", parse_window, arguments.window),
            ),
            length=parse_count("--length", arguments.length, least=2),
            tasks=[read_task(path) for path in arguments.tasks],
            limit=parse_count("--limit", arguments.limit, least=1) if arguments.limit else None,
            calibration=read_text(given, "--calibration-data") if given else built_in_text(),
            breadth=(
                parse_count("--breadth", arguments.breadth, least=1) if arguments.breadth else None
            ),
            folder=Path(arguments.output),
        )
        names = [task.name for task in asked.tasks]
        if len(set(names)) < len(names):
            raise OptionError(f"--tasks {' '.join(arguments.tasks)}: two have the same name")
        if asked.calibration.sha256 == asked.text.sha256:
            raise OptionError(
                f"--calibration-data {given}: it is the test text itself; a choice must not be "
                "tested on what it was made on"
            )
        check_writable(asked.folder / "results.json")
        return asked


def run(arguments: argparse.Namespace) -> int:
    """
    Raises:
        OptionError: see the options.
    """
    from orthorank_vllm.engine import measuring
    from orthorank_vllm.engine.workers import (
        WorkersTrial,
        loaded_workers,
        measuring_config,
        tokenizer_of,
    )

    asked = Asked.of(arguments)
    vllm_config = measuring_config(arguments)
    model_config = vllm_config.model_config
    tokenizer = tokenizer_of(model_config)
    segments = cut(asked.text, tokenizer.encode(asked.text.content), asked.length)
    profile = _profile(
        arguments.profile, model_identity(model_config.hf_text_config), asked.treatment
    )
    if profile.data is not None and profile.data["sha256"] == asked.text.sha256:
        raise OptionError(
            f"--data {arguments.data}: the profile {profile.name} was chosen on it; a choice must "
            "not be tested on what it was made on"
        )
    pruning = _pruning(asked, profile, model_config, tokenizer.encode)
    results = Results.load(
        asked.folder / "results.json", pruning.name, _identity(asked, pruning, len(segments))
    )
    results.versions = pruning.profile(Choice(pruning.num_layers)).versions
    results.profiles["orthorank"] = profile

    with loaded_workers(vllm_config) as workers:
        if "prune" in asked.methods and any(asked.ratios):
            count = selective_count("--ratios", max(asked.ratios), 0, pruning.num_layers)
            trial = WorkersTrial(workers, pruning.texts, pruning.treatment)
            results.profiles["prune"] = _pruned(trial, pruning, count, asked)
        runs = plan_runs(asked.methods, asked.ratios, results.profiles, asked.treatment)
        if not results.cosines:
            head = segments[0][:HEAT_MAP_TOKENS]
            results.cosines = workers.call(measuring.cosines_to_sink, head)
        shown = []
        for number, planned in enumerate(runs, start=1):
            measured = results.measured(planned)
            if measured is None:
                treatment = replace(asked.treatment, method=planned.method)
                scorer = Scorer(workers, planned.layers, treatment)
                label = f"{planned.label} ({number} of {len(runs)})"
                with tqdm(desc=f"{label}: text", total=len(segments), unit="segments") as bar:
                    value = perplexity(scorer, segments, bar.update)
                found = {}
                if asked.tasks:
                    with tqdm(desc=f"{label}: tasks", unit="answers") as bar:
                        found = accuracies(
                            scorer,
                            asked.tasks,
                            tokenizer,
                            int(model_config.max_model_len),
                            asked.limit,
                            bar.update,
                        )
                measured = replace(planned, perplexity=value, tasks=found)
                results.add(measured)
            shown.append(measured)
    results.write()
    write_report(results, shown, asked.folder / "report.html")
    print(results.table(shown))
    print(f"wrote {asked.folder / 'results.json'} and {asked.folder / 'report.html'}")
    return 0


def _identity(asked: Asked, measurement: Measurement, segments: int) -> dict[str, Any]:
    return {
        "model": measurement.model,
        "dtype": measurement.dtype,
        "keep": asked.treatment.keep,
        "window": asked.treatment.window,
        "data": {
            "name": asked.text.name,
            "sha256": asked.text.sha256,
            "length": asked.length,
            "segments": segments,
        },
        "tasks": {task.name: task.sha256 for task in asked.tasks},
        "limit": asked.limit,
    }


def _profile(path: str | None, model: dict[str, Any], treatment: Treatment) -> Profile:
    """
    Raises:
        OptionError: it cannot be used, or there is none.
    """
    from vllm import envs

    if path is not None:
        try:
            profile = read_profile(path)
            profile.check_fits(model)
        except ProfileError as error:
            raise OptionError(f"--profile {path}: {error}") from None
        return profile
    found = find_profile(model, treatment.keep, treatment.window, envs.VLLM_CACHE_ROOT)
    if found is None:
        raise OptionError(
            "--profile: none is known for this model; run `orthorank calibrate` first, or give one"
        )
    return found


def _pruning(
    asked: Asked, profile: Profile, model_config: Any, tokenize: Callable[[str], list[int]]
) -> Measurement:
    """Pruning measured as the profile was: on the same text, and on as many tokens of it."""
    tokens, length = DEFAULT_TOKENS, DEFAULT_LENGTH
    if profile.data is not None and profile.data["sha256"] == asked.calibration.sha256:
        tokens, length = profile.data["tokens"], profile.data["length"]
    elif "prune" in asked.methods:
        print(
            f"note: the layers to prune are chosen on {asked.calibration.name}, and the profile "
            "was on another text; --calibration-data gives both the same",
            file=sys.stderr,
        )
    treatment = replace(asked.treatment, method="prune")
    return Measurement.of(model_config, tokenize, asked.calibration, treatment, tokens, length)


def _pruned(trial: Any, measurement: Measurement, count: int, asked: Asked) -> Profile:
    """The greedy choice of whole layers to leave out; kept in the folder."""
    output = asked.folder / "prune.json"
    unfinished = asked.folder / "prune.json.unfinished"
    choice = found_so_far(measurement, output, unfinished)
    if len(choice.order) < count:
        print("choosing the layers to prune", file=sys.stderr)
        measure(trial, measurement, choice, count, unfinished, asked.breadth)
        write(measurement.profile(choice), output)
        unfinished.unlink(missing_ok=True)
    return measurement.profile(choice)


def _parse_methods(value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip() not in ("", "none")]
    known = [name for name in METHODS if name != "orthorank"]
    for name in names:
        if name not in known:
            raise OptionError(
                f"--against {value}: {name} is no method; give none, or some of {', '.join(known)}"
            )
    return list(dict.fromkeys(names))
