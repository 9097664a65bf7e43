"""The flags, through vLLM's own parser."""

from collections.abc import Callable
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

Parse = Callable[..., Any]


@pytest.fixture
def parsed(model_path: str) -> Parse:
    def parse(*flags: str) -> Any:
        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm serve"))
        return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", model_path, *flags]))

    return parse


def test_the_flags_stand_in_a_group_of_their_own() -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    group = next(group for group in parser._action_groups if group.title == "OrthoRank")
    flags = {flag for action in group._group_actions for flag in action.option_strings}
    assert flags == {
        "--orthorank-ratio",
        "--orthorank-keep",
        "--orthorank-window",
        "--orthorank-layers",
        "--orthorank-profile",
        "--orthorank-calibrate-seconds",
        "--orthorank-attention",
    }


def test_the_flags_become_the_options_offline(parsed: Parse) -> None:
    args = parsed("--orthorank-ratio", "0.3", "--orthorank-keep=0.25", "--orthorank-window", "0")
    assert args.additional_config == {"orthorank": {"ratio": 0.3, "keep": 0.25, "window": 0}}
    assert parsed("--orthorank-layers", "7,26").additional_config == {
        "orthorank": {"layers": (7, 26)}
    }


def test_underscores_are_taken_as_vllm_takes_them(parsed: Parse) -> None:
    assert parsed("--orthorank_ratio", "0.2").additional_config == {"orthorank": {"ratio": 0.2}}


def test_without_a_flag_there_is_no_trace_of_orthorank(parsed: Parse) -> None:
    assert parsed().additional_config == {}


def test_a_flag_wins_over_the_same_option_in_additional_config(parsed: Parse) -> None:
    args = parsed(
        "--additional-config",
        '{"orthorank": {"ratio": 0.1, "keep": 0.5}, "other": 1}',
        "--orthorank-ratio",
        "0.2",
    )
    assert args.additional_config == {"orthorank": {"ratio": 0.2, "keep": 0.5}, "other": 1}


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (("--orthorank-ratio", "1.5"), "argument --orthorank-ratio: 1.5: not allowed, give a"),
        (("--orthorank-ratio", "nan"), "argument --orthorank-ratio: nan: not allowed"),
        (("--orthorank-ratio", "much"), "argument --orthorank-ratio: much: not allowed"),
        (("--orthorank-keep", "0"), "argument --orthorank-keep: 0: not allowed"),
        (("--orthorank-window", "-3"), "argument --orthorank-window: -3: not allowed"),
        (("--orthorank-attention", "fast"), "fast: not allowed, give one of auto, gather, triton"),
        (("--orthorank-layers", "3,3"), "argument --orthorank-layers: 3,3: not allowed"),
    ],
)
def test_a_wrong_value_is_answered_in_one_line(
    parsed: Parse, flags: tuple[str, ...], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed(*flags)
    assert caught.value.code == 2
    assert answer in capsys.readouterr().err.splitlines()[-1]


def test_a_mistake_that_needs_the_model_to_be_seen_is_one_line_too(
    parsed: Parse, capsys: pytest.CaptureFixture[str]
) -> None:
    """Break seen: the exception of the offline interface, with its traceback."""
    args = parsed("--orthorank-layers", "3,99")
    with pytest.raises(SystemExit) as caught:
        args.create_engine_config()
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "vllm: error: --orthorank-layers 3,99: not allowed, this model has layers 0 to 29"
    )
