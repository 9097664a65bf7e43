"""The options of `orthorank bench`."""

from pathlib import Path

import pytest

from orthorank_vllm.bench.args import split_flags
from orthorank_vllm.cli.main import main
from tests.support.commands import refusal


def test_vllms_flags_go_to_every_server_and_orthoranks_to_its_own() -> None:
    argv = ["--dtype", "float32", "M", "--pairs", "6", "--orthorank-window=64", "--enforce-eager"]
    argv += ["--orthorank-layers", "29:0,12:1/4", "--orthorank-tail", "32", "--ratios", "auto"]
    argv += ["--orthorank-max-loss", "0.05"]
    common, rule = split_flags(argv, "M")
    assert common == ["--dtype", "float32", "--enforce-eager"]
    assert dict(zip(rule[::2], rule[1::2], strict=True)) == {
        "--orthorank-max-loss": "0.05",
        "--orthorank-window": "64",
        "--orthorank-tail": "32",
        "--orthorank-layers": "29:0,12:1/4",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratios", "1.5"], "--ratios 1.5: not allowed, give a number from 0"),
        (["--ratios", "0,0.3"], "--ratios 0,0.3: 0 is stock vLLM itself"),
        (
            ["--ratios", "0.3,0.9", "--orthorank-keep", "1/2"],
            "--orthorank-ratio 0.9: not allowed, with --orthorank-keep 0.5 give at most 0.5",
        ),
        (
            ["--ratios", "0.3", "--orthorank-max-loss", "0.1"],
            "--orthorank-max-loss 0.1: not allowed, it changes nothing without --orthorank-ratio a",
        ),
        (["--ratios", "auto", "--orthorank-layers", "2:0"], "--orthorank-ratio auto: not allowed"),
        (["--lengths", "32,65"], "--lengths 32,65: OrthoRank skips nothing of a prompt's first to"),
        (["--orthorank-tail", "600", "--lengths", "512"], "its last 600; give longer ones"),
        (["--lengths", "512,"], "--lengths : not allowed, give a whole number from 1"),
        (["--lengths", "9000"], "--lengths 9000: with what is generated a request has 9016"),
        (["--concurrency", "0"], "--concurrency 0: not allowed, give a whole number from 1"),
        (["--against", "magic"], "--against magic: magic is not known; give some of stock, prune"),
        (["--pairs", "6"], "--pairs 6: not allowed, give a whole number from 7"),
        (["--orthorank-ratio", "0.3"], "--orthorank-ratio: not here, each server has its own"),
        (["--data", "/none"], "--data /none: it cannot be read"),
        (["-o", "/proc/none"], "-o /proc/none/results.json: it cannot be written"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_any_server_starts(
    options: list[str],
    message: str,
    small_model_path: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refusal(
        capsys, "bench", small_model_path, "-o", str(tmp_path / "out"), *options
    )


def test_an_unknown_option_is_told_in_one_line_after_the_usage(
    small_model_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", small_model_path, "--pears", "6"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("orthorank bench: error: ")
    assert "unrecognized arguments: --pears 6" in line


def test_a_text_that_is_too_short_shows_before_any_server_starts(
    small_model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a few words only")
    line = refusal(capsys, "bench", small_model_path, "--data", str(text), "-o", str(tmp_path))
    assert "too few for this many different prompts of 512" in line
