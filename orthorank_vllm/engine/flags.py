"""The flags of `vllm serve`, and of every other command that takes vLLM's engine options."""

import argparse
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from orthorank_vllm.options import (
    ATTENTION_BACKENDS,
    DEFAULT_CALIBRATE_SECONDS,
    DEFAULT_WINDOW,
    OPTION_NAMES,
    OptionError,
    checked_mapping,
    flag_of,
    parse_attention,
    parse_calibrate_seconds,
    parse_keep,
    parse_layers,
    parse_profile,
    parse_ratio,
    parse_window,
)

STATUS_ROUTE = "orthorank_vllm.engine.endpoint.StatusRoute"


class FromCommandLine(dict[str, Any]):
    """Options that a command line gave: a mistake in them is answered without a traceback.

    vLLM copies its `EngineArgs` field by field, and into other processes. This goes with them,
    where a mark on the object would be lost, or be taken for a field.
    """


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
        f"{', '.join(ATTENTION_BACKENDS)} (default: auto).",
    )
    # vLLM's own interface for what a server is to do beside its routes.
    group.add_argument(
        "--orthorank-endpoint",
        dest="middleware",
        action="append_const",
        const=STATUS_ROUTE,
        default=argparse.SUPPRESS,
        help="Let the server answer GET /orthorank: what it runs and has counted, as JSON.",
    )


def with_flags(additional_config: Any, args: argparse.Namespace) -> Any:
    """vLLM's `additional_config` with the options that the command line gave in either way.

    Args:
        additional_config: as vLLM parsed it; any type, as vLLM leaves that open.
        args: all that was parsed. A flag goes before the same option in `additional_config`.

    Raises:
        OptionError: there is no place for the options in `additional_config`.
    """
    flags = {name: getattr(args, f"orthorank_{name}", None) for name in OPTION_NAMES}
    flags = {name: value for name, value in flags.items() if value is not None}
    if not isinstance(additional_config, dict):
        if not flags:
            return additional_config
        raise OptionError(
            f"--additional-config {' '.join(str(additional_config).split())}: not allowed beside "
            f"{flag_of(next(iter(flags)))}, give a JSON object"
        )
    if not flags and "orthorank" not in additional_config:
        return additional_config
    given = checked_mapping(additional_config.get("orthorank", {}))
    return {**additional_config, "orthorank": FromCommandLine({**given, **flags})}


def joined_lists(words: Sequence[str]) -> list[str]:
    """A configuration file's words, each list for one of our flags made one word with it.

    vLLM's reader makes `orthorank-layers: [7, 26]` the three words `--orthorank-layers 7 26`, of
    which the last would be taken for the model.
    """
    joined: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        if word.replace("_", "-").startswith("--orthorank-"):
            values = list(takewhile(lambda value: not value.startswith("--"), words))
            del words[: len(values)]
            word = "=".join([word, *([",".join(values)] if values else [])])
        joined.append(word)
    return joined


def _type(name: str, parse: Callable[[object], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return parse(text)
        except OptionError as error:
            # argparse names the option itself.
            message = str(error).removeprefix(f"{flag_of(name)} ")
            raise argparse.ArgumentTypeError(message) from None

    return convert
