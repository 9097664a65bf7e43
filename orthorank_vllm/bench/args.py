"""What a benchmark was asked for."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthorank_vllm.bench.paired_stats import LEAST_PAIRS
from orthorank_vllm.calibrate.text import BUILT_IN, Text, built_in_text, read_text
from orthorank_vllm.cli.args import parse_count
from orthorank_vllm.engine.flags import add_flags
from orthorank_vllm.files import check_writable
from orthorank_vllm.options import AUTO, OFFLINE, RATIO, OptionError, Options

RIVALS = {
    "stock": "stock vLLM",
    "prune": "as large a part of the layers left out",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options, and OrthoRank's flags of `vllm serve`."""
    _add_own(parser)
    add_flags(parser)


def _add_own(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--ratios",
        default="0.3",
        help=f'One after another; "{AUTO}" may be one (default: %(default)s).',
    )
    group.add_argument(
        "--lengths",
        default="512,2048",
        help="Tokens of the prompts (default: %(default)s).",
    )
    group.add_argument(
        "--concurrency",
        default="1,8",
        help="Clients at a time; 1 measures the time to the first token, more measure requests "
        "per second (default: %(default)s).",
    )
    group.add_argument(
        "--against",
        default="stock",
        help="What to compare with, some of: "
        + ", ".join(f"{name} ({text})" for name, text in RIVALS.items())
        + " (default: %(default)s).",
    )
    group.add_argument(
        "--output-len",
        default="16",
        help="Tokens that each request under load generates (default: %(default)s).",
    )
    group.add_argument(
        "--pairs",
        default="12",
        help=f"Times that each server is measured, from {LEAST_PAIRS} (default: %(default)s).",
    )
    group.add_argument(
        "--data",
        metavar="FILE",
        help=f'Text, or JSON lines with "text", to cut prompts from (default: {BUILT_IN}).',
    )
    group.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        default="orthorank-bench",
        help="Folder for results.json, plot.svg and the servers' logs (default: %(default)s).",
    )


@dataclass(frozen=True)
class BenchArgs:
    """The options, checked.

    Attributes:
        ratios: numbers, or "auto".
        flags: vLLM's, for every server, as given.
        rule_flags: for OrthoRank's servers alone.
    """

    model: str
    ratios: list[Any]
    lengths: list[int]
    clients: list[int]
    rivals: list[str]
    output_len: int
    pairs: int
    text: Text
    folder: Path
    flags: list[str]
    rule_flags: list[str]

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "BenchArgs":
        """Check what was given, and read the text.

        Raises:
            OptionError: the first option that cannot be.
        """
        flags, rule_flags = split_flags(arguments.argv, arguments.model_tag)
        if RATIO.flag in rule_flags:
            raise OptionError(
                f"{RATIO.flag}: not here, each server has its own ratio; give --ratios"
            )
        args = cls(
            model=arguments.model,
            ratios=[RATIO.parse(r, "--ratios") for r in arguments.ratios.split(",")],
            lengths=_counts("--lengths", arguments.lengths),
            clients=_counts("--concurrency", arguments.concurrency),
            rivals=_rivals(arguments.against),
            output_len=parse_count("--output-len", arguments.output_len, least=1),
            pairs=parse_count("--pairs", arguments.pairs, least=LEAST_PAIRS),
            text=read_text(arguments.data) if arguments.data else built_in_text(),
            folder=Path(arguments.output),
            flags=flags,
            rule_flags=rule_flags,
        )
        if not all(args.ratios):
            raise OptionError(
                f"--ratios {arguments.ratios}: 0 is stock vLLM itself; give numbers above 0"
            )
        args._check_rule(arguments)
        check_writable(args.folder / "results.json")
        return args

    def _check_rule(self, arguments: argparse.Namespace) -> None:
        """Refuse what OrthoRank's servers would, as far as that shows without the model."""
        given = {name: getattr(arguments, f"orthorank_{name}", None) for name in OFFLINE}
        for ratio in self.ratios:
            tail = Options.from_mapping({**given, "ratio": ratio}).tail
        if max(self.lengths) <= tail + 1:
            raise OptionError(
                f"--lengths {','.join(map(str, self.lengths))}: OrthoRank skips nothing of a "
                f"prompt's first token and its last {tail}; give longer ones"
            )


def split_flags(argv: list[str], model: str) -> tuple[list[str], list[str]]:
    """What a command line holds besides this command's own options and the model.

    Returns:
        the flags for every server, and those that only OrthoRank's understands.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_own(own)
    _, others = own.parse_known_args(argv)
    others.remove(model)
    rule = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in OFFLINE.values():
        rule.add_argument(option.flag, dest=option.flag)
    given, common = rule.parse_known_args(others)
    named = [(flag, value) for flag, value in vars(given).items() if value is not None]
    return common, [part for pair in named for part in pair]


def _counts(name: str, value: str) -> list[int]:
    counts = [parse_count(name, item.strip(), least=1) for item in value.split(",")]
    return list(dict.fromkeys(counts))


def _rivals(value: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in value.split(",")))
    for name in names:
        if name not in RIVALS:
            raise OptionError(
                f"--against {value}: {name or 'nothing'} is not known; give some of "
                f"{', '.join(RIVALS)}"
            )
    return names
