"""`orthorank device-check` where there is no GPU, and its parts that need none."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from orthorank_vllm.device_check import command, part, shapes
from orthorank_vllm.device_check.findings import Finding, Speed
from orthorank_vllm.device_check.kernel import CASES, ON_A_GPU, TOLERANCES
from tests.support.commands import refusal
from tests.support.scripts import Script

CHECK_MODEL = """
from dataclasses import asdict
from pathlib import Path
from orthorank_vllm.device_check import model, shapes
folder = shapes.write_small("Llama", Path(arguments[0]))
answer([asdict(finding) for finding in model.check_model(
    str(folder), "cpu", "float32", enforce_eager=True
)])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    answer = refusal(capsys, "device-check", "-o", str(tmp_path / "check"))
    assert "this machine has no NVIDIA GPU that torch" in answer
    assert not (tmp_path / "check" / "results.json").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--parts", "kernel,all"), "--parts kernel,all: all is not known; give some of kernel,"),
        (("--seconds", "5"), "--seconds 5: not allowed, give a whole number from 60"),
    ],
)
def test_a_wrong_option_is_answered_in_one_line(
    options: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert named in refusal(capsys, "device-check", *options, "-o", str(tmp_path))


def test_the_command_names_the_parts_that_there_are() -> None:
    """The command itself imports none of them: they start vLLM and Triton."""
    assert tuple(part.PARTS) == command.PARTS


def test_what_a_part_found_before_it_died_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(folder: Path, deadline: float) -> Iterator[Finding | Speed]:
        yield Finding("first", 1.0, 2.0)
        yield Speed("work", 100, {"stock": [1.0]})
        raise RuntimeError("out of memory")

    monkeypatch.setitem(part.PARTS, "speed", dies)
    monkeypatch.setattr(sys, "argv", ["part", "speed", str(tmp_path), "60"])
    with pytest.raises(RuntimeError):
        part.main()
    answer = json.loads((tmp_path / part.ANSWER).read_text())
    assert [finding["what"] for finding in answer["findings"]] == ["first"]
    assert [speed["tokens"] for speed in answer["speeds"]] == [100]


def test_every_case_of_the_kernel_has_a_tolerance() -> None:
    assert {case.dtype for case in (CASES | ON_A_GPU).values()} <= set(TOLERANCES)


def test_a_part_that_dies_is_told_by_its_last_error(tmp_path: Path) -> None:
    log = tmp_path / "speed.log"
    log.write_text("INFO starting\nTraceback\nRuntimeError: a | b\nprocess ended\n")
    assert command._last_words(log) == f"RuntimeError: a / b; see {log}"


def test_a_part_runs_in_a_process_of_its_own_and_its_failure_is_an_answer(tmp_path: Path) -> None:
    """Here because there is no GPU; there because of whatever it may be."""
    answer, failure = command._run_part("kernel", tmp_path / "kernel.log", seconds=100)
    if torch.cuda.is_available():
        assert failure is None
        assert answer["findings"]
    else:
        assert failure is not None
        assert "Error" in failure
        assert answer == {"findings": [], "speeds": []}
    _, late = command._run_part("kernel", tmp_path / "late.log", seconds=0)
    assert late == "no time was left; give more --seconds"


def test_the_large_model_is_a_configuration_alone(tmp_path: Path) -> None:
    folder = shapes.write_large(tmp_path / "model")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 32
    assert config["hidden_size"] == 4096


@pytest.mark.model
def test_a_small_model_is_checked_whole(tmp_path: Path) -> None:
    """The same as on a GPU, with the CPU's way for the kernel's: everything holds."""
    found = Script(CHECK_MODEL, str(tmp_path / "model")).answer
    by_name = {finding["what"]: finding for finding in found}
    attention = next(name for name in by_name if "against gather" in name and "calls" in name)
    # Two selective layers and the last one, in some steps each.
    assert int(attention.split(", ")[1].split()[0]) > 3 * 3
    for finding in found:
        if finding["allowed"] is not None:
            assert finding["measured"] <= finding["allowed"], finding["what"]
    sparse = next(name for name in by_name if "sparse against stock" in name)
    assert by_name[sparse]["measured"] > 0.05, "a model so dull that nothing could be seen"
