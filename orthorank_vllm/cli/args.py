"""Options that several commands share, and how they are read."""

import argparse
from collections.abc import Callable
from typing import Any

from orthorank_vllm.options import (
    DEFAULT_KEEP,
    DEFAULT_WINDOW,
    OptionError,
    parse_keep,
    parse_window,
)
from orthorank_vllm.selection.method import Method


def add_rule_arguments(group: Any) -> None:
    """`--keep` and `--window`."""
    group.add_argument("--keep", default=DEFAULT_KEEP, help="As --orthorank-keep (default: 1/3).")
    group.add_argument(
        "--window", default=DEFAULT_WINDOW, help="As --orthorank-window (default: %(default)s)."
    )


def rule_of(arguments: argparse.Namespace) -> Method:
    """
    Raises:
        OptionError: what `add_rule_arguments` added was given a value that cannot be.
    """
    return Method(
        keep=parse_option("--keep", parse_keep, arguments.keep),
        window=parse_option("--window", parse_window, arguments.window),
    )


def add_breadth_argument(group: Any) -> None:
    """`--breadth`."""
    group.add_argument(
        "--breadth",
        help="When layers are chosen, those to try in each step after the first: the ones that "
        "cost least at their last try (default: all; 8 is much faster and seldom chooses "
        "otherwise).",
    )


def breadth_of(arguments: argparse.Namespace) -> int | None:
    """
    Raises:
        OptionError: it cannot be.
    """
    if not arguments.breadth:
        return None
    return parse_count("--breadth", arguments.breadth, least=1)


def parse_option(name: str, parse: Callable[[object], Any], value: object) -> Any:
    """One of `options`' parsers, with this command's name of the option in its message."""
    try:
        return parse(value)
    except OptionError as error:
        message = str(error).partition(" ")[2]
        raise OptionError(f"{name} {message}") from None


def parse_count(name: str, value: object, least: int) -> int:
    """
    Raises:
        OptionError: not a whole number, or too small.
    """
    number = int(str(value)) if str(value).isdecimal() else 0
    if number < least:
        raise OptionError(f"{name} {value}: not allowed, give a whole number from {least}")
    return number
