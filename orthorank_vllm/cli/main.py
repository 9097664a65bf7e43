"""The command `orthorank`."""

import argparse
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from orthorank_vllm import __version__
from orthorank_vllm.compat import add_engine_arguments, argument_parser, import_vllm
from orthorank_vllm.options import OptionError

# Name: module with `add_arguments(parser)` and `run(arguments) -> exit status`, and what it does.
COMMANDS = {
    "calibrate": ("orthorank_vllm.calibrate.command", "choose a model's layers by measurement"),
    "evaluate": ("orthorank_vllm.evaluate.command", "measure what a ratio costs in quality"),
    "bench": ("orthorank_vllm.bench.command", "measure what a ratio gains in speed"),
    "doctor": ("orthorank_vllm.doctor.command", "check this installation, or a running server"),
}
# It takes neither a model nor vLLM's options.
WITHOUT_MODEL = "doctor"
INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    name = argv[0]
    if name not in COMMANDS:
        print(
            f"orthorank: error: {name}: no such command; there are {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    _quieten_vllm()
    try:
        run = _run if name == WITHOUT_MODEL else _run_on_model
        return run(name, argv[1:])
    except OptionError as error:
        print(f"orthorank {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def _run_on_model(name: str, argv: list[str]) -> int:
    # Before the command's module, which may import parts of it.
    try:
        import_vllm()
    except ImportError as error:
        raise OptionError(
            f"vLLM cannot be imported ({error}); pip install 'orthorank-vllm[vllm]'"
        ) from None
    module = _module_of(name)
    parser = argument_parser(
        prog=f"orthorank {name}",
        usage=f"orthorank {name} MODEL [options] [vLLM's engine options, such as --dtype]",
        description=module.__doc__,
    )
    parser.add_argument("model_tag", metavar="MODEL", help="A folder or hub name, as for vLLM.")
    module.add_arguments(parser)
    add_engine_arguments(parser)
    arguments = parser.parse_args(argv)
    arguments.model = arguments.model_tag
    arguments.argv = argv
    # A polite stop, whoever asks for it, keeps what was found.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return int(module.run(arguments))


def _run(name: str, argv: list[str]) -> int:
    module = _module_of(name)
    # Not vLLM's parser: this has to work where vLLM does not.
    parser = argparse.ArgumentParser(prog=f"orthorank {name}", description=module.__doc__)
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(argv)))


def _module_of(name: str) -> Any:
    return importlib.import_module(COMMANDS[name][0])


def _quieten_vllm() -> None:
    # Its start-up lines would bury the progress bar. Read when vLLM is imported.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    warnings.simplefilter("ignore", FutureWarning)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: orthorank COMMAND [MODEL] [options]", "", *lines, "", "orthorank COMMAND --help"]
    )
