"""What an evaluation was asked for."""

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank_vllm.calibrate.text import BUILT_IN, Text, built_in_text, read_text
from orthorank_vllm.cli.args import add_rule_arguments, add_stand_in_argument, parse_count, rule_of
from orthorank_vllm.evaluate.methods import METHODS
from orthorank_vllm.evaluate.runs import Layers
from orthorank_vllm.files import check_writable
from orthorank_vllm.options import (
    KEEP,
    LAYERS,
    RATIO,
    STAND_IN,
    OptionError,
)
from orthorank_vllm.selection.method import Method

if TYPE_CHECKING:
    from orthorank_vllm.evaluate.tasks import LoadedTask

DEFAULT_RATIOS = "0,0.1,0.2,0.3"
DEFAULT_AGAINST = "prune,random"
DEFAULT_PROMPT_LENS = "640"
DEFAULT_ANSWER_LEN = 128
DEFAULT_SAMPLES = 8
DEFAULT_LOOK_UPS = 24
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
    _add_layer_arguments(group)
    _add_measure_arguments(group)
    group.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        default="orthorank-evaluation",
        help="Folder for results.json and report.html; a run that was stopped goes on from "
        "there (default: %(default)s).",
    )


def _add_layer_arguments(group: Any) -> None:
    group.add_argument(
        "--profile",
        metavar="FILE",
        help="The layers and their keeps (default: what `vllm serve` would find).",
    )
    group.add_argument(
        "--layers",
        help=f"These layers instead, whatever the ratios: as {LAYERS.flag}, such as 29:0,12:1/4.",
    )
    group.add_argument(
        "--keep", help=f"As {KEEP.flag}: of every layer, or of the --layers that have none."
    )
    add_rule_arguments(group)
    add_stand_in_argument(group)
    group.add_argument(
        "--calibration-data",
        metavar="FILE",
        help="The text to choose the layers to prune with; that of the profile, for a fair "
        f"comparison (default: {BUILT_IN}).",
    )


def _add_measure_arguments(group: Any) -> None:
    group.add_argument(
        "--prompt-lens",
        default=DEFAULT_PROMPT_LENS,
        help="Tokens of the prompts, one or more numbers (default: %(default)s).",
    )
    group.add_argument(
        "--answer-len",
        default=DEFAULT_ANSWER_LEN,
        help="Tokens of the answers (default: %(default)s).",
    )
    group.add_argument(
        "--samples",
        default=DEFAULT_SAMPLES,
        help="Texts of each kind, prose, copy and chat (default: %(default)s).",
    )
    group.add_argument(
        "--look-ups",
        default=DEFAULT_LOOK_UPS,
        help="Lists in which to look something up, one question each (default: %(default)s).",
    )
    group.add_argument(
        "--length",
        default=DEFAULT_SEGMENT,
        help="Tokens of each segment of the whole text, of which the perplexity is measured; 0: "
        "leave that out (default: %(default)s).",
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


@dataclass(frozen=True)
class EvaluateArgs:
    """The options, checked.

    Attributes:
        layers: given by hand, each with its keep; None: the profile's.
        keep: of every layer, if given.
        length: of the text's segments; 0: its perplexity is left out.
    """

    text: Text
    ratios: list[float]
    methods: list[str]
    rule: Method
    stand_in: str
    layers: Layers | None
    keep: float | None
    prompt_lens: list[int]
    answer_len: int
    samples: int
    look_ups: int
    length: int
    tasks: "list[LoadedTask]"
    limit: int | None
    calibration: Text
    folder: Path

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "EvaluateArgs":
        """Check what was given, and read the texts and tasks.

        Raises:
            OptionError: the first option that cannot be.
        """
        _require("matplotlib", *(["lm_eval"] if arguments.tasks else []))
        given = arguments.calibration_data
        keep = None if arguments.keep is None else KEEP.parse(arguments.keep, "--keep")
        args = cls(
            text=read_text(arguments.data),
            ratios=[_parse_ratio(ratio) for ratio in arguments.ratios.split(",")],
            methods=[Method.name, *_parse_methods(arguments.against)],
            rule=rule_of(arguments),
            stand_in=STAND_IN.parse(arguments.stand_in, "--stand-in"),
            layers=_parse_layers(arguments, keep),
            keep=keep,
            prompt_lens=_parse_prompt_lens(arguments.prompt_lens),
            answer_len=parse_count("--answer-len", arguments.answer_len, least=1),
            samples=parse_count("--samples", arguments.samples, least=0),
            look_ups=parse_count("--look-ups", arguments.look_ups, least=0),
            length=_parse_length(arguments.length),
            limit=parse_count("--limit", arguments.limit, least=1) if arguments.limit else None,
            calibration=read_text(given, "--calibration-data") if given else built_in_text(),
            folder=Path(arguments.output),
            tasks=_tasks(arguments.tasks),
        )
        if args.calibration.sha256 == args.text.sha256:
            raise OptionError(
                f"--calibration-data {given or BUILT_IN}: it is the test text itself; a choice "
                "must not be tested on what it was made on"
            )
        check_writable(args.folder / "results.json")
        return args

    def check_lengths(self, longest: int) -> None:
        """Check that the model takes texts of these lengths.

        Raises:
            OptionError: one is too long.
        """
        most = max(self.prompt_lens)
        if most + self.answer_len > longest:
            raise OptionError(
                "--prompt-lens",
                most,
                f"with --answer-len {self.answer_len} this model takes at most "
                f"{longest - self.answer_len}",
            )
        if self.length > longest:
            raise OptionError("--length", self.length, f"this model takes at most {longest}")


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


def _parse_ratio(value: str) -> float:
    ratio = RATIO.parse(value, "--ratios")
    if not isinstance(ratio, float):
        raise OptionError("--ratios", value, "give numbers from 0 (dense) to below 1")
    return ratio


def _parse_methods(value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip() not in ("", "none")]
    known = [name for name in METHODS if name != Method.name]
    for name in names:
        if name not in known:
            raise OptionError(
                f"--against {value}: {name} is no method; give none, or some of {', '.join(known)}"
            )
    return list(dict.fromkeys(names))


def _parse_layers(arguments: argparse.Namespace, keep: float | None) -> Layers | None:
    if arguments.layers is None:
        return None
    layers = LAYERS.parse(arguments.layers, "--layers")
    if arguments.profile is not None:
        raise OptionError(
            "--layers", arguments.layers, f"it excludes --profile {arguments.profile}; give one"
        )
    return tuple(layer.with_keep(keep) for layer in layers)


def _parse_prompt_lens(value: str) -> list[int]:
    lengths = [parse_count("--prompt-lens", length, least=2) for length in value.split(",")]
    return list(dict.fromkeys(lengths))


def _parse_length(value: object) -> int:
    return 0 if str(value) == "0" else parse_count("--length", value, least=2)
