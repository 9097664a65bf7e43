"""`orthorank evaluate`, run as a user would, and its report in a browser."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from orthorank_vllm.calibrate.text import built_in_text
from orthorank_vllm.cli.main import main
from orthorank_vllm.profiles import Profile, cached_path, model_identity, read_profile
from tests.support.commands import refusal
from tests.support.reference import Reference, Rule

pytestmark = pytest.mark.model

ORDER = (3, 1, 4)
QUESTIONS = [
    {
        "query": "Question: What is the capital of France?",
        "choices": ["Paris", "Cheese"],
        "gold": 0,
    },
    {"query": "Question: What do bees make?", "choices": ["Steel", "Honey", "Glass"], "gold": 1},
]
CONTINUATIONS = [
    {"context": "One, two, three, four, five, six,", "continuation": "seven"},
    {"context": "Monday, Tuesday, Wednesday,", "continuation": "Thursday"},
    {"context": "The sky is", "continuation": "marmalade"},
]


@pytest.fixture(scope="module")
def folder(small_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, two tasks and a profile."""
    from transformers import AutoConfig

    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "test.txt").write_text(built_in_text().content[200_000:203_500])
    for name, records in (("capitals", QUESTIONS), ("next", CONTINUATIONS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    # The second as a task of lm-eval's.
    task = {
        "task": "next",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "next.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{continuation}}",
    }
    (folder / "next.yaml").write_text(yaml.safe_dump(task))
    model = model_identity(AutoConfig.from_pretrained(small_model_path))
    data = {"name": "t", "sha256": "0" * 64, "tokens": 512, "length": 512}
    losses = (5.0, 5.5, 6.0)
    Profile("mine", model, ORDER, 1 / 3, 128, losses=losses, dense_loss=4.5, data=data).write(
        folder / "profile.json"
    )
    return folder


def options(folder: Path) -> list[str]:
    return [
        *("--dtype", "float32", "--data", str(folder / "test.txt"), "--length", "256"),
        *("--ratios", "0,0.2", "--profile", str(folder / "profile.json")),
        *("--tasks", str(folder / "capitals.jsonl"), str(folder / "next.yaml")),
        *("--breadth", "1", "-o", str(folder / "out")),
    ]


def run(model_path: str, *given: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    program = Path(sys.executable).with_name("orthorank")
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_LOGGING_LEVEL"}
    return subprocess.run(
        [str(program), "evaluate", model_path, *given],
        capture_output=True,
        text=True,
        env={**inherited, **environment},
        check=False,
    )


def evaluate(small_model_path: str, folder: Path) -> tuple[str, str]:
    result = run(small_model_path, *options(folder))
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def printed(small_model_path: str, folder: Path) -> tuple[str, str]:
    return evaluate(small_model_path, folder)


@pytest.fixture(scope="module")
def results(printed: tuple[str, str], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return found


def test_perplexity_is_the_references(
    results: dict[str, Any], small_model_path: str, folder: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(small_model_path)
    tokens = tokenizer((folder / "test.txt").read_text())["input_ids"]
    segments = [tokens[start : start + 256] for start in range(0, len(tokens) - 255, 256)]
    assert results["identity"]["data"]["segments"] == len(segments) >= 2
    runs = {run["method"]: run for run in results["runs"]}
    assert set(runs) == {"dense", "orthorank", "prune", "random"}
    assert runs["orthorank"]["layers"] == [1, 3]
    assert len(runs["prune"]["layers"]) == 1
    for method, layers in (("dense", ()), ("orthorank", (1, 3))):
        reference = Reference(model, Rule(layers))
        losses = []
        for segment in segments:
            log_probs = reference.start(segment).forward(0, 256)[:-1]
            losses.append(-log_probs.gather(1, torch.tensor(segment[1:])[:, None]).mean())
        wanted = math.exp(float(torch.stack(losses).mean()))
        assert runs[method]["perplexity"] == pytest.approx(wanted, rel=1e-3)


def test_accuracy_is_that_of_the_models_own_scores(
    results: dict[str, Any], small_model_path: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(small_model_path)
    reference = Reference(model, Rule(()))

    def score(context: str, continuation: str) -> tuple[float, bool]:
        before, text = tokenizer(context)["input_ids"], tokenizer(context + continuation)
        tokens = text["input_ids"]
        log_probs = reference.start(tokens).forward(0, len(tokens))[len(before) - 1 : -1]
        targets = torch.tensor(tokens[len(before) :])
        total = float(log_probs.gather(1, targets[:, None]).sum())
        return total, bool((log_probs.argmax(-1) == targets).all())

    right = 0
    for question in QUESTIONS:
        scores = [
            score(f"{question['query']}\nAnswer:", f" {choice}")[0]
            for choice in question["choices"]  # type: ignore[attr-defined]
        ]
        right += scores.index(max(scores)) == question["gold"]
    greedy = [score(str(c["context"]), f" {c['continuation']}")[1] for c in CONTINUATIONS]
    [dense] = [run for run in results["runs"] if run["method"] == "dense"]
    assert dense["tasks"]["capitals"]["acc"] == right / len(QUESTIONS)
    assert dense["tasks"]["next"]["acc"] == pytest.approx(sum(greedy) / len(CONTINUATIONS))
    assert dense["tasks"]["next"]["questions"] == 3


def test_the_table_and_the_bars_are_on_the_terminal(printed: tuple[str, str]) -> None:
    stdout, stderr = printed
    table = [line.split()[0] for line in stdout.splitlines()]
    assert table[:5] == ["method", "dense", "orthorank", "prune", "random"]
    assert "orthorank 0.2 (2 of 4): text: 100%" in stderr


def test_a_second_run_measures_nothing_again(
    printed: tuple[str, str], small_model_path: str, folder: Path
) -> None:
    before = json.loads((folder / "out" / "results.json").read_text())
    stdout, stderr = evaluate(small_model_path, folder)
    assert "segments" not in stderr
    assert stdout == printed[0]
    assert json.loads((folder / "out" / "results.json").read_text()) == before


def test_the_report_shows_its_figures_in_a_browser_and_loads_nothing(
    printed: tuple[str, str], folder: Path
) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        if "CI" in os.environ:
            pytest.fail("CI needs chromium: make browser")
        pytest.skip("no chromium here; make browser installs one")
    from playwright.sync_api import sync_playwright

    requests: list[str] = []
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 900})
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((folder / "out" / "report.html").as_uri())
        assert page.title() == "OrthoRank on SmolLM2-first-6-layers"
        cells = [row.inner_text().split("\t")[0] for row in page.locator("tr").all()[1:]]
        assert [cell.strip() for cell in cells] == [
            "dense",
            "orthorank 0.2",
            "prune 0.2",
            "random 0.2",
        ]
        figures = page.locator("figure").all()
        assert [figure.get_attribute("id") for figure in figures] == [
            "perplexity",
            "task-capitals",
            "task-next",
            "steps",
            "cosines",
        ]
        for figure in figures:
            box = figure.locator("svg").bounding_box()
            assert box is not None
            assert box["width"] > 300
            assert box["height"] > 150
        legend = page.locator("#perplexity svg").text_content() or ""
        assert all(name in legend for name in ("dense", "orthorank", "prune", "random"))
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        browser.close()
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert complaints == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "/nowhere.txt"], "--data /nowhere.txt: it cannot be read"),
        (["--against", "prune,magic"], "--against prune,magic: magic is no method; give none, or"),
        (["--ratios", "0,x"], "--ratios x: not allowed, give a number"),
        (["--length", "1"], "--length 1: not allowed, give a whole number from 2"),
        (["--length", "4096"], "test.txt: it is too short, it has"),
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
        import hashlib

        content = json.loads((folder / "profile.json").read_text())
        content["name"] = "peeked"
        content["data"]["sha256"] = hashlib.sha256(test.read_bytes()).hexdigest()
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
    assert "run `orthorank calibrate` first, or give one" in capsys.readouterr().err


def test_a_profile_that_is_kept_for_other_weights_is_not_taken_for_these(
    small_model_path: str, folder: Path, tmp_path: Path
) -> None:
    """Break seen: a fine-tune evaluated with its base's layers, which no server takes."""
    given = read_profile(folder / "profile.json")
    path = cached_path(tmp_path, given.model["config_sha256"], "a" * 64, 1 / 3, 128)
    replace(given, weights="a" * 64).write(path)
    plain = ["--dtype", "float32", "--data", str(folder / "test.txt"), "--length", "256"]
    plain += ["--ratios", "0", "--against", "random", "-o", str(tmp_path / "out")]
    refused = run(small_model_path, *plain, VLLM_CACHE_ROOT=str(tmp_path))
    assert refused.returncode == 2
    assert "the profile mine was measured on other weights of this shape" in refused.stderr
    assert "run `orthorank calibrate` on these" in refused.stderr
    assert "Traceback" not in refused.stderr
    told = run(small_model_path, *plain, "--profile", str(path))
    assert told.returncode == 0, told.stderr
    assert "note: the profile mine was measured on other weights" in told.stderr
