"""The commands, called as their program calls them."""

import pytest

from orthorank_vllm.cli import main


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line in which a command says what is wrong with its options.

    argparse puts the usage before its own.
    """
    try:
        status, lines = main([*argv]), 1
    except SystemExit as stopped:
        status, lines = int(str(stopped.code)), 2
    assert status == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 or lines == 2
    assert err[-1].startswith(f"orthorank {argv[0]}: error: ")
    return err[-1]
