"""The commands, called as their program calls them."""

import pytest

from orthorank_vllm.cli.main import main


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line in which a command says what is wrong with its options."""
    assert main([*argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"orthorank {argv[0]}: error: ")
    assert err.count("\n") == 1
    return err
