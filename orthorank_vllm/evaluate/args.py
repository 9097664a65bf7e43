"""What an evaluation was asked for."""

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orthorank_vllm.calibrate.text import BUILT_IN, Text, built_in_text, read_text
from orthorank_vllm.cli.args import (
    add_breadth_argument,
    add_rule_arguments,
    breadth_of,
    parse_count,
    rule_of,
)
from orthorank_vllm.evaluate.methods import METHODS
from orthorank_vllm.files import check_writable
from orthorank_vllm.options import RATIO, OptionError
from orthorank_vllm.selection.method import Method

if TYPE_CHECKING:
    from orthorank_vllm.evaluate.tasks import LoadedTask

DEFAULT_RATIOS = "0,0.1,0.2,0.3"
DEFAULT_AGAINST = "prune,random"
DEFAULT_SEGMENT = 2048  # the paper's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--data", metavar="FILE", required=True, help='Text, or JSON lines with "text", to test on.'
    )
    group.add_argument(
        "--ratios", default=DEFAULT_RATIOS, help="0 is the dense model (default: %(default)s)."
    )
    others = ", ".join(
        f"{name} ({method.description})" for name, method in METHODS.items() if name != Method.name
    )
    group.add_argument(
        "--against",
        default=DEFAULT_AGAINST,
        help=f"What to compare with, none or some of: {others} (default: %(default)s).",
    )
    group.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="Tasks of lm-eval by name, YAML files of such tasks, or JSON lines with "
        '"query", "choices", "gold" or "context", "continuation".',
    )
    group.add_argument("--limit", help="Questions of each task (default: all).")
    add_rule_arguments(group)
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
    add_breadth_argument(group)
    group.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        default="orthorank-evaluation",
        help="Folder for results.json and report.html; a run that was stopped goes on from "
        "there (default: %(default)s).",
    )


@dataclass(frozen=True)
class EvaluateArgs:
    """The options, checked."""

    text: Text
    ratios: list[float]
    methods: list[str]
    method: Method
    length: int
    tasks: "list[LoadedTask]"
    limit: int | None
    calibration: Text
    breadth: int | None
    folder: Path

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "EvaluateArgs":
        """Check what was given, and read the texts and tasks.

        Raises:
            OptionError: the first option that cannot be.
        """
        _require("matplotlib", *(["lm_eval"] if arguments.tasks else []))
        given = arguments.calibration_data
        args = cls(
            text=read_text(arguments.data),
            ratios=[RATIO.parse(r, "--ratios") for r in arguments.ratios.split(",")],
            methods=["orthorank", *_parse_methods(arguments.against)],
            method=rule_of(arguments),
            length=parse_count("--length", arguments.length, least=2),
            limit=parse_count("--limit", arguments.limit, least=1) if arguments.limit else None,
            calibration=read_text(given, "--calibration-data") if given else built_in_text(),
            breadth=breadth_of(arguments),
            folder=Path(arguments.output),
            tasks=_tasks(arguments.tasks),
        )
        if args.calibration.sha256 == args.text.sha256:
            raise OptionError(
                f"--calibration-data {given}: it is the test text itself; a choice must not be "
                "tested on what it was made on"
            )
        check_writable(args.folder / "results.json")
        return args


def _require(*modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise OptionError(
            f"{' and '.join(missing)} cannot be imported; pip install 'orthorank-vllm[evaluate]'"
        )


def _tasks(given: list[str]) -> "list[LoadedTask]":
    if not given:
        return []
    # lm-eval is an extra.
    from orthorank_vllm.evaluate.tasks import load_tasks

    return load_tasks(given)


def _parse_methods(value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip() not in ("", "none")]
    known = [name for name in METHODS if name != Method.name]
    for name in names:
        if name not in known:
            raise OptionError(
                f"--against {value}: {name} is no method; give none, or some of {', '.join(known)}"
            )
    return list(dict.fromkeys(names))
