"""The flags, through vLLM's own parser."""

import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from orthorank_vllm.options import ALIGNED, OptionError

Parse = Callable[..., Any]


@cache
def vllm_parser() -> FlexibleArgumentParser:
    """The part of vLLM's own that takes the engine's options."""
    parser = FlexibleArgumentParser(prog="vllm")
    serve = parser.add_subparsers(dest="subparser").add_parser("serve")
    serve.add_argument("model_tag", nargs="?")
    # As among the server's options.
    serve.add_argument("--middleware", action="append", default=[])
    AsyncEngineArgs.add_cli_args(serve)
    return parser


def serve_arguments(*words: str) -> Any:
    """What `vllm serve` with these words is told."""
    arguments = vllm_parser().parse_args(["serve", *words])
    if arguments.model_tag is not None:
        arguments.model = arguments.model_tag
    return arguments


@pytest.fixture
def parsed(model_path: str) -> Parse:
    def parse(*flags: str) -> Any:
        # First: vLLM loads its plugins with the parser.
        arguments = serve_arguments(model_path, *flags)
        return AsyncEngineArgs.from_cli_args(arguments)

    return parse


def test_the_flags_stand_in_a_group_of_their_own() -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    group = next(group for group in parser._action_groups if group.title == "OrthoRank")
    flags = {flag for action in group._group_actions for flag in action.option_strings}
    assert flags == {
        "--orthorank-ratio",
        "--orthorank-max-ratio",
        "--orthorank-max-loss",
        "--orthorank-keep",
        "--orthorank-window",
        "--orthorank-tail",
        "--orthorank-min-prompt",
        "--orthorank-aligned",
        "--orthorank-stand-in",
        "--orthorank-layers",
        "--orthorank-profile",
        "--orthorank-calibrate-seconds",
        "--orthorank-attention",
        "--orthorank-shadow",
        "--orthorank-endpoint",
    }


def test_the_flags_become_the_options_offline(parsed: Parse) -> None:
    args = parsed("--orthorank-ratio", "0.3", "--orthorank-keep=0.25", "--orthorank-window", "0")
    assert args.additional_config == {"orthorank": {"ratio": 0.3, "keep": 0.25, "window": 0}}
    assert parsed("--orthorank-ratio", "auto", "--orthorank-max-loss=0.05").additional_config == {
        "orthorank": {"ratio": "auto", "max_loss": 0.05}
    }
    layers = parsed("--orthorank-layers", "29:0,12:1/4,7", "--orthorank-tail", "32")
    assert layers.additional_config == {
        "orthorank": {"layers": ((29, 0.0), (12, 0.25), (7, None)), "tail": 32}
    }


def test_underscores_are_taken_as_vllm_takes_them(parsed: Parse) -> None:
    assert parsed("--orthorank_ratio", "0.2").additional_config == {"orthorank": {"ratio": 0.2}}


def test_without_a_flag_there_is_no_trace_of_orthorank(parsed: Parse) -> None:
    """Break seen: an attribute of ours on the object, which `cls(**vars(...))` does not take."""
    args = parsed()
    assert args.additional_config == {}
    assert vars(args).keys() == set(args.__dataclass_fields__)


def test_a_flag_leaves_nothing_on_vllms_arguments_but_the_options(parsed: Parse) -> None:
    """`vllm bench latency` copies them so."""
    args = parsed("--orthorank-ratio", "0.2")
    assert type(args)(**vars(args)).additional_config == {"orthorank": {"ratio": 0.2}}


def test_a_flag_wins_over_the_same_option_in_additional_config(parsed: Parse) -> None:
    args = parsed(
        "--additional-config",
        '{"orthorank": {"ratio": 0.1, "keep": 0.5}, "other": 1}',
        "--orthorank-ratio",
        "0.2",
    )
    assert args.additional_config == {"orthorank": {"ratio": 0.2, "keep": 0.5}, "other": 1}


def test_the_endpoint_is_one_more_middleware(model_path: str) -> None:
    """By vLLM's own option, whose values stay."""
    opened = serve_arguments(model_path, "--middleware", "a.b", "--orthorank-endpoint")
    assert opened.middleware == ["a.b", "orthorank_vllm.engine.endpoint.StatusRoute"]
    assert serve_arguments(model_path).middleware == []


@pytest.mark.parametrize(
    ("line", "given"),
    [("off", False), ("'off'", False), ("false", False), ("on", True), ("'on'", True)],
)
@pytest.mark.parametrize("is_nested", [True, False])
def test_a_configuration_file_may_say_off_without_quotes(
    parsed: Parse, tmp_path: Path, line: str, given: bool, is_nested: bool
) -> None:
    """YAML reads a bare `off` as false.

    Break seen: vLLM's reader alone, which leaves that out.
    """
    file = tmp_path / "serve.yaml"
    nested = f"additional-config:\n  orthorank: {{ratio: 0.2, aligned: {line}}}\n"
    flat = f"orthorank-ratio: 0.2\northorank_aligned: {line}\nenforce-eager: false\n"
    file.write_text(nested if is_nested else flat)
    options = parsed("--config", str(file)).additional_config["orthorank"]
    assert ALIGNED.parse(options["aligned"]) is given


def test_a_bare_off_means_no_stand_in_too(parsed: Parse, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("orthorank-ratio: 0.2\northorank-stand-in: off\northorank-endpoint: off\n")
    options = parsed("--config", str(file)).additional_config["orthorank"]
    assert options == {"ratio": 0.2, "stand_in": "off"}


@pytest.mark.parametrize("before_the_model", [True, False])
@pytest.mark.parametrize(
    "layers", ["7,26:0,14:1/4", [7, "26:0", "14:0.25"], ["7", "26:0,14:1/4"], "7,26:0,14:0.25"]
)
def test_a_configuration_file_may_give_the_layers_as_a_list(
    model_path: str, tmp_path: Path, layers: object, before_the_model: bool
) -> None:
    """Break seen: vLLM's reader alone, by which the last layer becomes the model's name."""
    file = tmp_path / "serve.yaml"
    options = {"orthorank-layers": layers, "orthorank_keep": 0.5, "orthorank-endpoint": True}
    words = ["--config", str(file)]
    if before_the_model:
        options |= {"model": model_path}
    else:
        words = [model_path, *words]
    file.write_text(yaml.safe_dump(options | {"max-num-seqs": 3}))
    arguments = serve_arguments(*words)
    assert arguments.model == model_path
    assert arguments.orthorank_layers == ((7, None), (26, 0), (14, 0.25))
    assert arguments.orthorank_keep == 0.5
    assert (arguments.max_num_seqs, len(arguments.middleware)) == (3, 1)


@pytest.mark.parametrize("layers", ["[29:0, 26:0]", "29:0", "[12:0.25]"])
def test_a_layer_without_its_quotes_in_a_yaml_file_is_told_of_them(
    parsed: Parse,
    model_path: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    layers: str,
) -> None:
    """YAML reads 29:0 as hours and minutes: 1740."""
    file = tmp_path / "serve.yaml"
    file.write_text(f"orthorank-layers: {layers}\n")
    with pytest.raises(SystemExit) as caught:
        parsed("--config", str(file)).create_engine_config()
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--orthorank-layers" in last
    assert "in a YAML list" in last
    assert 'quotes, "29:0"' in last


def test_layers_may_stand_before_the_model(model_path: str) -> None:
    """Break seen: a flag that takes all words after it."""
    arguments = serve_arguments("--orthorank-layers", "7,26:0", model_path)
    assert (arguments.model, arguments.orthorank_layers) == (model_path, ((7, None), (26, 0)))


def by_flag(name: str, value: object, folder: Path) -> list[str]:
    return [f"--orthorank-{name.replace('_', '-')}={value}"]


def by_json(name: str, value: object, folder: Path) -> list[str]:
    return ["--additional-config", json.dumps({"orthorank": {name: value}})]


def by_dots(name: str, value: object, folder: Path) -> list[str]:
    return [f"--additional-config.orthorank.{name}", str(value)]


def by_file(name: str, value: object, folder: Path) -> list[str]:
    file = folder / "options.yaml"
    file.write_text(yaml.safe_dump({f"orthorank-{name}": value}))
    return ["--config", str(file)]


def by_nested_file(name: str, value: object, folder: Path) -> list[str]:
    file = folder / "options.yaml"
    file.write_text(yaml.safe_dump({"additional-config": {"orthorank": {name: value}}}))
    return ["--config", str(file)]


WRONG = [
    *[("ratio", value) for value in ("1.5", "nan", "inf", "much", "", "1e999999999", -1, "a\nb")],
    ("ratio", "Auto"),
    *[("max_loss", value) for value in (-0.1, "inf", "nan", "little")],
    *[("keep", value) for value in ("-1", "1", "1/0", "1/3/4", 7, "x" * 9)],
    *[("window", value) for value in (-3, 0.5, "99999999999999999999", "many")],
    *[("tail", value) for value in (0, -1, 0.5, "99999999999999999999", "long")],
    *[("aligned", value) for value in ("yes", "Off", "", 0, 1)],
    *[("layers", value) for value in ("3,3", "", "-1,3", "7,,8", "1.5", "7;8", [3, 3], [-1])],
    *[("layers", value) for value in ("3:1", "3:", "3:0:0", "3:0,3:1/4", "3:-0.1", ["3:x"])],
    *[("calibrate_seconds", value) for value in (-1, "inf", "soon")],
    *[("attention", value) for value in ("fast", "CPU", "")],
    ("profile", ""),
]


@pytest.mark.parametrize("way", [by_flag, by_json, by_dots, by_file, by_nested_file])
@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_answered_in_one_line(
    parsed: Parse,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    way: Callable[[str, object, Path], list[str]],
    name: str,
    value: object,
) -> None:
    """Break seen: a number with a large exponent, which took all memory to write out."""
    with pytest.raises(SystemExit) as caught:
        parsed(*way(name, value, tmp_path)).create_engine_config()
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"--orthorank-{name.replace('_', '-')}" in last
    assert "not allowed, " in last


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_offline_is_one_line_too(model_path: str, name: str, value: object) -> None:
    args = EngineArgs(model=model_path, additional_config={"orthorank": {name: value}})
    with pytest.raises(OptionError, match=r"^--orthorank-.* not allowed, ") as caught:
        args.create_engine_config()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [0.3, None, "ratio", [1], True])
@pytest.mark.parametrize("flags", [(), ("--orthorank-ratio", "0.3")])
def test_options_that_are_no_dictionary_are_answered_in_one_line(
    parsed: Parse,
    model_path: str,
    capsys: pytest.CaptureFixture[str],
    given: object,
    flags: tuple[str, ...],
) -> None:
    """Break seen: such a value, spread into a dictionary."""
    for words in (
        ["--additional-config", json.dumps({"orthorank": given})],
        ["--additional-config.orthorank", json.dumps(given)],
    ):
        with pytest.raises(SystemExit) as caught:
            parsed(*words, *flags).create_engine_config()
        assert caught.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f'vllm: error: additional_config["orthorank"] = {given!r}: not all')
    if not flags:
        with pytest.raises(OptionError, match="not allowed, give a dictionary with keys from"):
            EngineArgs(
                model=model_path, additional_config={"orthorank": given}
            ).create_engine_config()


@pytest.mark.parametrize("given", ["null", "3", "[1]"])
def test_an_additional_config_without_room_for_the_flags_is_answered_in_one_line(
    parsed: Parse, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed("--additional-config", given, "--orthorank-ratio", "0.3")
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"vllm: error: --additional-config {given}: not allowed beside --orthorank-ratio, "
        "give a JSON object"
    )


@pytest.mark.parametrize("copied", ["itself", "field by field", "into another process"])
def test_a_mistake_that_needs_the_model_to_be_seen_is_one_line_too(
    parsed: Parse, capsys: pytest.CaptureFixture[str], copied: str
) -> None:
    """Break seen: the exception of the offline interface, with its traceback."""
    args = parsed("--orthorank-layers", "3,99")
    if copied == "field by field":
        args = EngineArgs(**{name: vars(args)[name] for name in EngineArgs.__dataclass_fields__})
    elif copied == "into another process":
        args = pickle.loads(pickle.dumps(args))
    with pytest.raises(SystemExit) as caught:
        args.create_engine_config()
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "vllm: error: --orthorank-layers 3,99: not allowed, this model has layers 0 to 29"
    )
