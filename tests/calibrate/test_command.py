"""`orthorank calibrate`, run as a user would."""

import hashlib
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from orthorank_vllm.calibrate.command import table
from orthorank_vllm.profiles import Cost, Entry, Profile, read_profile
from tests.calibrate.program import calibrate, num_kept, tried_in
from tests.support.commands import refusal
from tests.support.models import WEIGHT_ONLY, fingerprint_of, write_untrained

KINDS = ["prose", "look-up", "copy", "chat"]
INT8 = json.dumps({"quantization_config_dict_json": json.dumps(WEIGHT_ONLY)})


@pytest.fixture(scope="module")
def text_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n".join(topics[name] for name in sorted(topics))[50_000:70_000])
    return path


@pytest.fixture(scope="module")
def finished_run(
    small_model_path: str, text_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """A profile, and how many sets were tried for it."""
    output = tmp_path_factory.mktemp("profiles") / "small.json"
    process = calibrate(small_model_path, "--data", str(text_path), "-o", str(output))
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert f"wrote {output}" in stdout
    assert table(read_profile(output)) in stdout
    assert "100% |" in stderr.splitlines()[-1]
    return output, tried_in(stderr)


@pytest.fixture(scope="module")
def finished(finished_run: tuple[Path, int]) -> Path:
    return finished_run[0]


@pytest.mark.model
def test_a_profile_reaches_the_ratio_and_says_what_it_was_made_on(
    finished: Path, small_model_path: str, text_path: Path
) -> None:
    profile = read_profile(finished)
    assert profile.name == "SmolLM2-first-6-layers"
    assert profile.data is not None
    assert profile.data["calibration"] == {
        "name": "text.txt",
        "sha256": hashlib.sha256(text_path.read_bytes()).hexdigest(),
        "samples": dict.fromkeys(KINDS, 1),
        "prompt": 144,
        "answer": 24,
    }
    assert profile.data["held_back"] | {"sha256": ""} == {
        "name": "Python's standard library",
        "sha256": "",
        "samples": dict.fromkeys(KINDS, 1),
        "prompt": 144,
        "answer": 16,
    }
    assert (profile.window, profile.tail, profile.method) == (32, 64, "orthorank")
    assert (profile.weights, profile.dtype) == (fingerprint_of(small_model_path), "float32")
    assert profile.versions.keys() == {"orthorank-vllm", "vllm", "torch"}
    assert max(profile.ratios) > 0.3 - 1e-9
    assert sorted(path.name for path in finished.parent.iterdir()) == [
        "small.json",
        "small.safetensors",
    ]


@pytest.mark.model
def test_the_last_layer_comes_first_as_it_costs_nothing_and_each_set_costs_more(
    finished: Path,
) -> None:
    entries = read_profile(finished).entries
    assert entries[0].layer_keep == (5, 0)
    for entry in entries:
        for cost in (entry.cost, entry.held_back):
            assert cost is not None
            assert list(cost.loss) == KINDS
    costs = [sum(entry.cost.loss.values()) for entry in entries if entry.cost]
    assert costs[0] == 0 < costs[-1]
    assert costs == sorted(costs)


@pytest.mark.model
def test_an_interrupted_calibration_goes_on_to_what_one_with_more_threads_finds(
    finished_run: tuple[Path, int], small_model_path: str, text_path: Path, tmp_path: Path
) -> None:
    """Both halves have two threads, and `finished` has one."""
    output, kept = tmp_path / "small.json", tmp_path / "small.json.measured"
    options = ["--data", str(text_path), "-o", str(output)]
    process = calibrate(small_model_path, *options, threads=2)
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None and num_kept(kept) < 8:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert "stopped at ratio 0." in stderr
    assert f"of 0.3; what was measured is kept in {kept}: run the same command again" in stderr
    assert "Traceback" not in stderr
    assert not output.exists()
    before = num_kept(kept)

    process = calibrate(small_model_path, *options, threads=2)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert not kept.exists()
    whole_path, tried = finished_run
    for entry, of_whole in zip(
        read_profile(output).entries, read_profile(whole_path).entries, strict=True
    ):
        assert entry.layer_keep == of_whole.layer_keep
        for cost, other in ((entry.cost, of_whole.cost), (entry.held_back, of_whole.held_back)):
            assert cost is not None
            assert other is not None
            assert cost.loss == pytest.approx(other.loss, abs=1.01e-4)
    assert 0 < tried_in(stderr) <= tried - before


@pytest.mark.model
def test_what_was_measured_is_not_measured_again(
    finished: Path, small_model_path: str, text_path: Path
) -> None:
    before = finished.read_bytes()
    options = ["--data", str(text_path), "-o", str(finished), "--max-ratio", "0.2"]
    process = calibrate(small_model_path, *options)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    count = len(read_profile(finished).entries)
    assert f"{finished} has these {count} layers already, measured as now" in stdout
    assert finished.read_bytes() == before


@pytest.mark.model
def test_what_can_be_served_can_be_calibrated(
    finished: Path, small_model_path: str, text_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "small.json"
    narrow = ["--dtype", "bfloat16", "--quantization", "torchao", "--hf-overrides", INT8]
    given = ["--data", str(text_path), "-o", str(output), "--max-ratio", "0.1"]
    process = calibrate(small_model_path, *given, *narrow)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    exact, found = read_profile(finished), read_profile(output)
    assert found.dtype == "bfloat16"
    assert found.entries[0].layer_keep == exact.entries[0].layer_keep
    assert found.identity != exact.identity


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
        (["--max-ratio", "1"], "--max-ratio 1: not allowed, give a number above 0 and below 1"),
        (["--max-ratio", "0"], "--max-ratio 0: not allowed, give a number above 0 and below 1"),
        (["--max-ratio", "auto"], "--max-ratio auto: not allowed, give a number above 0"),
        (["--max-ratio", "nan"], "--max-ratio nan: not allowed, give a number above 0"),
        (["--window", "-1"], "--window -1: not allowed, give a whole number"),
        (["--tail", "0"], "--tail 0: not allowed, give a whole number of tokens from 1"),
        (["--samples", "0"], "--samples 0: not allowed, give a whole number from 1"),
        (["--samples", "few"], "--samples few: not allowed, give a whole number from 1"),
        (["--data", "/nowhere.txt"], "--data /nowhere.txt: it cannot be read (No such file"),
        (["--data", "{short}"], "--data short.txt: it is too short, a stretch of "),
        (["--held-back", "/nowhere.txt"], "--held-back /nowhere.txt: it cannot be read"),
        (["--held-back", "{short}"], "--held-back short.txt: it is too short, a stretch of "),
        (
            ["--data", "{short}", "--held-back", "{short}"],
            "--held-back short.txt: it is the text that layers are chosen on; give another",
        ),
        (["-o", "/proc/none/profile.json"], "-o /proc/none/profile.json: it cannot be written"),
        (["-o", "{folder}"], "it cannot be written (it is a folder)"),
        (["-o", "{old}"], "its format is 1 and this orthorank-vllm reads 5"),
        (["-o", "{short}"], "short.txt: it is not JSON"),
        (["--load-format", "dummy"], "--load-format dummy: not possible here, it loads no weights"),
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size 2: not possible here"),
        (["--hf-overrides", '{"max_position_embeddings": 512}'], "and it has 512 positions"),
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
        Profile("old", {**read_profile(finished).model}, (Entry(1, 0.0),), 32, 64).write(output)
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
        [line] = [line for line in stderr.splitlines() if "orthorank calibrate: error" in line]
        assert "it cannot be written (No space left on device)" in line
        assert "Traceback" not in stderr
        assert output.read_bytes() == before
        assert {path.name for path in folder.iterdir()} == {"small.json", "filler"}
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_the_table_tells_what_answers_lose_on_held_back_text() -> None:
    entries = (
        Entry(29, 0.0, Cost({"prose": 0.1}, 1.0), Cost({"prose": 0.25, "look-up": 0.5}, 0.9)),
        Entry(3, 1 / 3, Cost({"prose": 0.125}), None),
        Entry(4, 1 / 2),
    )
    lines = table(Profile("m", {"num_hidden_layers": 10}, entries, 128, 64)).splitlines()
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "29 0 0.100 prose 0.250, look-up 0.500 nats a token; 90% of numbers found",
        "3 0.333 0.167 prose 0.125 nats a token",
        "4 0.5 0.217",
    ]
