"""Look at this installation, or at a running server: one line for each check, with the mend.

The exit status is 1 if a check failed; warnings do not fail.
"""

import argparse
import json
import os
from dataclasses import asdict

from orthorank_vllm.doctor import installation, server
from orthorank_vllm.doctor.check import FAILED, lines_of

KEY_VARIABLE = "OPENAI_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument(
        "url",
        metavar="URL",
        nargs="?",
        help="A running server, such as http://127.0.0.1:8000; without one, this installation.",
    )
    parser.add_argument(
        "--api-key",
        help=f"The server's API key (default: ${KEY_VARIABLE}, as for vLLM's own clients).",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of lines.")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; returns the exit status, 1 where something failed.

    Raises:
        OptionError: the URL is none.
    """
    if arguments.url is None:
        checks = list(installation.checks())
    else:
        key = arguments.api_key or os.environ.get(KEY_VARIABLE)
        checks = list(server.checks(server.Client(arguments.url, key)))
    if arguments.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        print("\n".join(lines_of(checks)))
    return int(any(check.state == FAILED for check in checks))
