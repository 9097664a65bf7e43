"""Options that several commands share, and how they are read."""

import argparse
from typing import Any

from orthorank_vllm.options import STAND_IN, TAIL, WINDOW, OptionError
from orthorank_vllm.selection.method import Method


def add_rule_arguments(group: Any) -> None:
    """Add `--window` and `--tail`."""
    for option in (WINDOW, TAIL):
        group.add_argument(
            f"--{option.name}",
            default=option.default,
            help=f"As {option.flag} (default: %(default)s).",
        )


def add_stand_in_argument(group: Any) -> None:
    """Add `--stand-in`, of which `STAND_IN` is the parser."""
    group.add_argument("--stand-in", default=STAND_IN.default, help=f"As {STAND_IN.flag}.")


def rule_of(arguments: argparse.Namespace) -> Method:
    """The selection rule with the options that `add_rule_arguments` added.

    Raises:
        OptionError: what `add_rule_arguments` added was given a value that cannot be.
    """
    return Method(
        window=WINDOW.parse(arguments.window, "--window"),
        tail=TAIL.parse(arguments.tail, "--tail"),
    )


def parse_count(name: str, value: object, least: int) -> int:
    """A whole number that is not below the least.

    Raises:
        OptionError: not a whole number, or too small.
    """
    number = int(str(value)) if str(value).isdecimal() else least - 1
    if number < least:
        raise OptionError(name, value, f"give a whole number from {least}")
    return number
