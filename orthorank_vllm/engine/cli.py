"""The flags of `vllm serve`."""

import argparse
from collections.abc import Callable
from typing import Any

from orthorank_vllm.options import (
    ATTENTION_WAYS,
    DEFAULT_CALIBRATE_SECONDS,
    DEFAULT_WINDOW,
    OPTION_NAMES,
    OptionError,
    flag_of,
    parse_attention,
    parse_calibrate_seconds,
    parse_keep,
    parse_layers,
    parse_profile,
    parse_ratio,
    parse_window,
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group of options to vLLM's parser; a second call changes nothing."""
    if "--orthorank-ratio" in parser._option_string_actions:
        return
    group = parser.add_argument_group(
        title="OrthoRank",
        description="Sparse prefill: in some layers only the prompt tokens most orthogonal to "
        "the first token are computed. Decode is not changed.",
    )

    def add_flag(name: str, parse: Callable[[object], Any], text: str) -> None:
        group.add_argument(
            flag_of(name), type=_type(name, parse), default=argparse.SUPPRESS, help=text
        )

    add_flag(
        "ratio",
        parse_ratio,
        "Fraction of the prompt's token-layer updates to skip, from 0 to below 1 - keep. "
        "0 or absent: stock vLLM.",
    )
    add_flag(
        "keep",
        parse_keep,
        "Fraction of the tokens that a selective layer updates (default: 1/3).",
    )
    add_flag(
        "window",
        parse_window,
        "Prompt positions that compete with each other; 0 is the whole prompt "
        f"(default: {DEFAULT_WINDOW}).",
    )
    add_flag(
        "layers",
        parse_layers,
        "The selective layers, such as 7,26,14 (default: from the model's profile).",
    )
    add_flag(
        "profile",
        parse_profile,
        "A file with the model's layers in the order in which to make them selective "
        "(default: one that `orthorank calibrate` made, or the shipped one).",
    )
    add_flag(
        "calibrate_seconds",
        parse_calibrate_seconds,
        "Where the model has no profile: time to choose its layers by measurement when it is "
        "first started; 0 takes evenly spaced ones "
        f"(default: {DEFAULT_CALIBRATE_SECONDS:g}).",
    )
    add_flag(
        "attention",
        parse_attention,
        f"How the selected tokens attend, for comparisons and as a way out: one of "
        f"{', '.join(ATTENTION_WAYS)} (default: auto).",
    )


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The options that the command line set, by their names offline."""
    values = {name: getattr(args, f"orthorank_{name}", None) for name in OPTION_NAMES}
    return {name: value for name, value in values.items() if value is not None}


def _type(name: str, parse: Callable[[object], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return parse(text)
        except OptionError as error:
            # argparse names the option itself.
            message = str(error).removeprefix(f"{flag_of(name)} ")
            raise argparse.ArgumentTypeError(message) from None

    return convert
