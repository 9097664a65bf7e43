"""The flags of `vllm serve`, and of every other command that takes vLLM's engine options."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from orthorank_vllm.options import (
    ALIGNED,
    ENDPOINT,
    OFF,
    OFFLINE,
    STAND_IN,
    Option,
    OptionError,
    checked_mapping,
)

STATUS_ROUTE = "orthorank_vllm.engine.endpoint.StatusRoute"


class FromCommandLine(dict[str, Any]):
    """Options that a command line gave: a mistake in them is answered without a traceback.

    vLLM copies its `EngineArgs` field by field, and into other processes. This goes with them,
    where a mark on the object would be lost, or be taken for a field.
    """


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group of options to vLLM's parser; a second call changes nothing."""
    if ENDPOINT.flag in parser._option_string_actions:
        return
    group = parser.add_argument_group(
        title="OrthoRank",
        description="Sparse prefill: in some layers only some of a prompt's tokens are computed, "
        "those most orthogonal to the first one, and its last ones. Decode is not changed.",
    )

    for option in OFFLINE.values():
        # vLLM's reader of `--config` files makes a word without a value of a bare `on` of YAML's.
        alone: dict[str, Any] = {"nargs": "?", "const": True} if option is ALIGNED else {}
        group.add_argument(
            option.flag, type=_type(option), default=argparse.SUPPRESS, help=option.help, **alone
        )
    # vLLM's own interface for what a server is to do beside its routes.
    group.add_argument(
        ENDPOINT.flag,
        dest="middleware",
        action="append_const",
        const=STATUS_ROUTE,
        default=argparse.SUPPRESS,
        help=ENDPOINT.help,
    )


def _type(option: Option) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return option.parse(text)
        except OptionError as error:
            # argparse names the option itself.
            raise argparse.ArgumentTypeError(error.of_value) from None

    return convert


def with_flags(additional_config: Any, args: argparse.Namespace) -> Any:
    """vLLM's `additional_config` with the options that the command line gave in either way.

    Args:
        additional_config: as vLLM parsed it; any type, as vLLM leaves that open.
        args: all that was parsed. A flag goes before the same option in `additional_config`.

    Raises:
        OptionError: there is no place for the options in `additional_config`.
    """
    flags = {name: getattr(args, f"orthorank_{name}", None) for name in OFFLINE}
    flags = {name: value for name, value in flags.items() if value is not None}
    if not isinstance(additional_config, dict):
        if not flags:
            return additional_config
        raise OptionError(
            f"--additional-config {' '.join(str(additional_config).split())}: not allowed beside "
            f"{OFFLINE[next(iter(flags))].flag}, give a JSON object"
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


def switched_off(given: Mapping[str, Any]) -> list[str]:
    """The words for those of our flags to which a configuration file says a bare `off`.

    YAML reads false, which vLLM's reader leaves out.
    """
    flags = {f"--{name}".replace("_", "-") for name, value in given.items() if value is False}
    return [f"{option.flag}={OFF}" for option in (ALIGNED, STAND_IN) if option.flag in flags]
