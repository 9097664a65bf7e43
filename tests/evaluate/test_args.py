"""What `orthorank evaluate` refuses."""

import hashlib
import json
from pathlib import Path

import pytest

from orthorank_vllm.cli.main import main
from tests.evaluate.conftest import options
from tests.support.commands import refusal

pytestmark = pytest.mark.model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "/nowhere.txt"], "--data /nowhere.txt: it cannot be read"),
        (["--against", "prune,magic"], "--against prune,magic: magic is no method; give none, or"),
        (["--ratios", "0,x"], "--ratios x: not allowed, give a number"),
        (["--ratios", "auto"], "--ratios auto: not allowed, give numbers from 0"),
        (["--ratios", "0.5"], "--ratios 0.5: it is more than the 0.3333 that the 3 layers of"),
        (["--layers", "3,3"], "--layers 3,3: not allowed, give different layer indices"),
        (["--layers", "3"], "--layers 3: not allowed, it excludes --profile"),
        (["--keep", "1"], "--keep 1: not allowed, give a number from 0 to below 1"),
        (["--prompt-lens", "640,x"], "--prompt-lens x: not allowed, give a whole number from 2"),
        (["--prompt-lens", "640,9000"], "--prompt-lens 9000: not allowed, with --answer-len 16"),
        (["--prompt-lens", "20"], "a prompt of 20 tokens is too short for"),
        (["--samples", "-1"], "--samples -1: not allowed"),
        (["--length", "1"], "--length 1: not allowed, give a whole number from 2"),
        (["--length", "4096"], "test.txt: it is too short, it has"),
        (["--length", "9000"], "--length 9000: not allowed, this model takes at most 8192"),
        (["--limit", "-3"], "--limit -3: not allowed"),
        (["--calibration-data", "{test}"], "it is the test text itself"),
        (["--profile", "{test}"], "it is not JSON"),
        (["--profile", "{peeked}"], "the profile peeked was chosen on it"),
        (["-o", "/proc/none"], "-o /proc/none/results.json: it cannot be written"),
        (["--tasks", "{test}"], "line 1 is not a JSON object"),
    ],
)
def test_bad_input_is_named_in_one_line(
    capsys: pytest.CaptureFixture[str],
    small_model_path: str,
    folder: Path,
    change: list[str],
    message: str,
) -> None:
    test = folder / "test.txt"
    names = {"{test}": str(test), "{peeked}": str(folder / "peeked.json")}
    if change[1] == "{peeked}":
        content = json.loads((folder / "profile.json").read_text())
        content["name"] = "peeked"
        content["data"]["calibration"]["sha256"] = hashlib.sha256(test.read_bytes()).hexdigest()
        (folder / "peeked.json").write_text(json.dumps(content))
    given = [*options(folder), "-o", str(folder / "other")]
    given += [names.get(option, option) for option in change]
    assert message in refusal(capsys, "evaluate", small_model_path, *given)


def test_a_model_without_a_profile_is_sent_to_calibrate(
    capsys: pytest.CaptureFixture[str],
    small_model_path: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    test = str(folder / "test.txt")
    options = ["--dtype", "float32", "--data", test, "--length", "256", "-o", str(tmp_path / "o")]
    assert main(["evaluate", small_model_path, *options]) == 2
    assert "run `orthorank calibrate` first, or give one, or --layers" in capsys.readouterr().err
