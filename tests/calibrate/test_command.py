"""`orthorank calibrate`, run as a user would."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orthorank_vllm.calibrate.text import read_text, segments
from orthorank_vllm.profiles import Profile, read_profile
from tests.support.commands import refusal
from tests.support.models import WEIGHT_ONLY, fingerprint_of, write_untrained
from tests.support.reference import Reference, Rule

OPTIONS = ["--dtype", "float32", "--tokens", "1024", "--max-ratio", "0.4", "--window", "64"]
# Nor is there room for a KV cache, and none is needed.
ALL_MEMORY = ["--gpu-memory-utilization", "1"]
INT8 = json.dumps({"quantization_config_dict_json": json.dumps(WEIGHT_ONLY)})


def calibrate(model_path: str, *options: str) -> "subprocess.Popen[str]":
    program = Path(sys.executable).with_name("orthorank")
    environment = {**os.environ}
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    return subprocess.Popen(
        [str(program), "calibrate", model_path, *OPTIONS, *ALL_MEMORY, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As in a terminal, also where the tests run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture(scope="module")
def text_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n".join(topics[name] for name in sorted(topics))[50_000:70_000])
    return path


@pytest.fixture(scope="module")
def finished(
    small_model_path: str, text_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("profiles") / "small.json"
    process = calibrate(small_model_path, "--data", str(text_path), "-o", str(output))
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert f"wrote {output}" in stdout
    assert "layer 4 of 4 100%" in stderr
    return output


@pytest.mark.model
def test_each_step_takes_the_layer_that_raises_the_references_loss_least(
    finished: Path, small_model_path: str, text_path: Path
) -> None:
    profile = read_profile(finished)
    tokenizer = AutoTokenizer.from_pretrained(small_model_path)
    texts = segments(read_text(str(text_path)), tokenizer.encode, tokens=1024, length=512)
    model = AutoModelForCausalLM.from_pretrained(small_model_path, dtype=torch.float32)

    def loss(*layers: int) -> float:
        reference = Reference(model, Rule(layers, window=64))
        losses = []
        for text in texts:
            targets = torch.tensor(text[1:])[:, None]
            losses.append(-reference.start(text).forward(0, 512)[:-1].gather(1, targets))
        return float(torch.cat(losses).mean())

    assert profile.dense_loss == pytest.approx(loss(), abs=1e-3)
    assert len(profile.order) == 4
    chosen: list[int] = []
    for layer, measured in zip(profile.order, profile.losses, strict=True):
        losses = {other: loss(*chosen, other) for other in range(6) if other not in chosen}
        assert measured == pytest.approx(losses[layer], abs=1e-3)
        assert losses[layer] < min(losses.values()) + 1e-3
        chosen.append(layer)


@pytest.mark.model
def test_a_profile_says_how_it_was_made(
    finished: Path, small_model_path: str, text_path: Path
) -> None:
    import hashlib

    profile = read_profile(finished)
    assert profile.name == "SmolLM2-first-6-layers"
    assert profile.data == {
        "name": "text.txt",
        "sha256": hashlib.sha256(text_path.read_bytes()).hexdigest(),
        "tokens": 1024,
        "length": 512,
    }
    assert (profile.keep, profile.window, profile.method) == (1 / 3, 64, "orthorank")
    assert profile.weights == fingerprint_of(small_model_path)
    assert profile.trials == 6 + 5 + 4 + 3
    assert profile.versions.keys() == {"orthorank-vllm", "vllm", "torch"}
    assert [path.name for path in finished.parent.iterdir()] == ["small.json"]


@pytest.mark.model
@pytest.mark.parametrize(
    "options", [["--dtype", "bfloat16"], ["--quantization", "torchao", "--hf-overrides", INT8]]
)
def test_what_can_be_served_can_be_calibrated(
    finished: Path, small_model_path: str, text_path: Path, tmp_path: Path, options: list[str]
) -> None:
    output = tmp_path / "small.json"
    given = ["--data", str(text_path), "-o", str(output), "--max-ratio", "0.1", *options]
    process = calibrate(small_model_path, *given)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    exact, found = read_profile(finished).dense_loss, read_profile(output).dense_loss
    assert found != exact
    assert found == pytest.approx(exact, abs=0.2)


@pytest.mark.model
def test_a_stopped_calibration_goes_on_where_it_was(
    finished: Path, small_model_path: str, text_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "small.json"
    unfinished = tmp_path / "small.json.unfinished"
    options = ["--data", str(text_path), "-o", str(output)]
    process = calibrate(small_model_path, *options)
    until = time.monotonic() + 120
    while time.monotonic() < until and not (
        unfinished.exists() and json.loads(unfinished.read_text())["trials"] >= 8
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert f"1 of 4 layers are kept in {unfinished}" in stderr
    assert "Traceback" not in stderr
    assert not output.exists()
    kept = read_profile(unfinished)
    assert kept.tried

    process = calibrate(small_model_path, *options)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "going on from 1 of 4 layers" in stderr
    assert not unfinished.exists()
    whole, found = read_profile(finished), read_profile(output)
    assert (found.order, found.losses, found.trials) == (whole.order, whole.losses, whole.trials)


@pytest.mark.model
def test_what_was_measured_is_not_measured_again_on_the_same_weights(
    finished: Path, small_model_path: str, text_path: Path, tmp_path: Path
) -> None:
    """Break seen: weights not told apart, a fine-tune "had these layers already"."""
    before = finished.read_bytes()
    options = ["--data", str(text_path), "-o"]
    process = calibrate(small_model_path, *options, str(finished))
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "has these 4 layers already" in stdout
    assert finished.read_bytes() == before

    others = tmp_path / "others.json"
    replace(read_profile(finished), weights="0" * 64).write(others)
    process = calibrate(small_model_path, *options, str(others))
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert f"wrote {others}" in stdout
    assert read_profile(others).weights == fingerprint_of(small_model_path)


@pytest.mark.model
def test_a_model_no_better_than_chance_is_refused_and_leaves_nothing(
    small_model_path: str, text_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "new.json"
    model = write_untrained(small_model_path, tmp_path / "untrained")
    process = calibrate(model, "--data", str(text_path), "-o", str(output))
    _, stderr = process.communicate()
    assert process.returncode == 2
    [line] = [line for line in stderr.splitlines() if "orthorank calibrate: error" in line]
    assert "MODEL untrained: its layers cannot be chosen on text.txt, the dense model's" in line
    assert "nats a token, is no better than chance, 10.8" in line
    assert "Traceback" not in stderr
    assert list(output.parent.iterdir()) == []


@pytest.mark.model
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-ratio", "0.9"], "--max-ratio 0.9: not allowed, it makes 8 of this model's 6"),
        (["--max-ratio", "half"], "--max-ratio half: not allowed, give a number from 0"),
        (["--keep", "0"], "--keep 0: not allowed, give a number above 0"),
        (["--window", "-1"], "--window -1: not allowed, give a whole number"),
        (["--tokens", "12"], "--tokens 12: not allowed, give a whole number from 512"),
        (["--breadth", "0"], "--breadth 0: not allowed, give a whole number from 1"),
        (["--data", "/nowhere.txt"], "--data /nowhere.txt: it cannot be read (No such file"),
        (["--data", "{short}"], "it is too short, 4 stretches of 512 tokens are needed"),
        (["-o", "/proc/none/profile.json"], "-o /proc/none/profile.json: it cannot be written"),
        (["-o", "{folder}"], "it cannot be written (it is a folder)"),
        (["-o", "{old}"], "its format is 1 and this orthorank-vllm reads 4"),
        (["--load-format", "dummy"], "--load-format dummy: not possible here, it loads no weights"),
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size 2: not possible here"),
    ],
)
def test_bad_input_is_named_in_one_line(
    capsys: pytest.CaptureFixture[str],
    small_model_path: str,
    tmp_path: Path,
    options: list[str],
    message: str,
) -> None:
    old = tmp_path / "old.json"
    old.write_text('{"format": 1}')
    short = tmp_path / "short.txt"
    short.write_text("few words")
    names = {"{old}": str(old), "{short}": str(short), "{folder}": str(tmp_path)}
    output = [] if "-o" in options else ["-o", str(tmp_path / "new.json")]
    options = [names.get(option, option) for option in options]
    given = ["--dtype", "float32", *options, *output]
    assert message in refusal(capsys, "calibrate", small_model_path, *given)
    assert old.read_text() == '{"format": 1}'
    assert {path.name for path in tmp_path.iterdir()} == {"old.json", "short.txt"}


def test_a_model_that_is_not_there_is_named_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = [str(tmp_path / "none"), "-o", str(tmp_path / "new.json")]
    assert "vLLM cannot load it" in refusal(capsys, "calibrate", *given)


@pytest.mark.model
def test_a_full_disk_leaves_the_old_profile(
    finished: Path, small_model_path: str, text_path: Path
) -> None:
    """A file system of 64 kB, filled."""
    folder = finished.parent.parent / "full"
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a file system")
    try:
        output = folder / "small.json"
        Profile("old", {**read_profile(finished).model}, (1,), 0.5, 64).write(output)
        before = output.read_bytes()
        filler = subprocess.run(
            ["dd", "if=/dev/zero", f"of={folder / 'filler'}", "bs=4k"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "No space left" in filler.stderr
        process = calibrate(small_model_path, "--data", str(text_path), "-o", str(output))
        _, stderr = process.communicate()
        assert process.returncode == 2
        assert "it cannot be written (No space left on device)" in stderr
        assert "Traceback" not in stderr
        assert output.read_bytes() == before
        assert {path.name for path in folder.iterdir()} == {"small.json", "filler"}
    finally:
        subprocess.run(["umount", str(folder)], check=True)
