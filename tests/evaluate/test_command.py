"""`orthorank evaluate`, run as a user would, and its report in a browser."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orthorank_vllm.calibrate.kinds import make_samples
from orthorank_vllm.calibrate.text import read_text
from orthorank_vllm.profile_store import kept_path
from orthorank_vllm.profiles import read_profile
from tests.evaluate.conftest import ANSWER, CONTINUATIONS, PROMPT, QUESTIONS, options, tasks
from tests.support.reference import Reference, Rule

pytestmark = pytest.mark.model

KINDS = ("prose", "look-up", "copy", "chat")


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
    result = run(small_model_path, *options(folder), *tasks(folder))
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def printed(small_model_path: str, folder: Path) -> tuple[str, str]:
    return evaluate(small_model_path, folder)


@pytest.fixture(scope="module")
def results(printed: tuple[str, str], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def model(small_model_path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(small_model_path, dtype=torch.float32)


def runs_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {run["method"]: run for run in results["runs"]}


def reference_of(model: Any, run: dict[str, Any]) -> Reference:
    """The model whose layers are selective, or are left out."""
    layers = dict(run["layers"])
    if run["method"] != "prune":
        return Reference(model, Rule(layers))
    reference = Reference(model, Rule({}))
    kept = [layer for index, layer in enumerate(reference.layers) if index not in layers]
    reference.layers = kept
    return reference


@pytest.mark.parametrize("method", ["dense", "orthorank", "prune"])
def test_answers_and_the_whole_text_are_the_references(
    method: str, results: dict[str, Any], model: Any, small_model_path: str, folder: Path
) -> None:
    run = runs_of(results)[method]
    reference = reference_of(model, run)

    def log_probs(tokens: Sequence[int], prompt_len: int) -> torch.Tensor:
        request = reference.start(tokens[:prompt_len])
        for token in tokens[prompt_len:]:
            request.append(token)
        found = request.forward(0, len(tokens))[:-1]
        return found.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]

    tokenizer = AutoTokenizer.from_pretrained(small_model_path)
    text = read_text(str(folder / "test.txt"))
    for kind, count in (("prose", 1), ("look-up", 2)):
        samples = make_samples(kind, text, tokenizer, count, PROMPT, ANSWER)
        of_answers = [log_probs(s.tokens, s.prompt_len)[s.prompt_len - 1 :] for s in samples]
        loss = run["served"][str(PROMPT)][kind]
        assert loss["nats"] == pytest.approx(-float(torch.cat(of_answers).mean()), rel=1e-3)
    tokens = tokenizer(text.content)["input_ids"]
    segments = [tokens[start : start + 256] for start in range(0, len(tokens) - 255, 256)]
    assert results["identity"]["segments"] == {"length": 256, "count": len(segments)}
    of_segments = [log_probs(segment, len(segment)) for segment in segments]
    wanted = math.exp(-float(torch.cat(of_segments).mean()))
    assert run["perplexity"] == pytest.approx(wanted, rel=1e-3)


def test_every_method_has_its_layers_and_every_kind_its_figures(results: dict[str, Any]) -> None:
    runs = runs_of(results)
    third = pytest.approx(1 / 3)
    assert list(runs) == ["dense", "orthorank", "prune", "random"]
    assert runs["orthorank"]["layers"] == runs["random"]["layers"] == [[3, third], [1, third]]
    assert [keep for _, keep in runs["prune"]["layers"]] == [0, 0]
    for name, run in runs.items():
        of_kinds = run["served"][str(PROMPT)]
        assert list(of_kinds) == list(KINDS)
        assert [loss["answers"] for loss in of_kinds.values()] == [1, 2, 1, 1]
        for kind, loss in of_kinds.items():
            assert (loss["kl"] == 0) == (name == "dense")
            dense = runs["dense"]["served"][str(PROMPT)][kind]["nats"]
            assert loss["dense_nats"] == pytest.approx(dense, rel=1e-6)


def test_accuracy_is_that_of_the_models_own_scores(
    results: dict[str, Any], model: Any, small_model_path: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_model_path)
    reference = Reference(model, Rule({}))

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
    dense = runs_of(results)["dense"]
    assert dense["tasks"]["capitals"]["acc"] == right / len(QUESTIONS)
    assert dense["tasks"]["next"]["acc"] == pytest.approx(sum(greedy) / len(CONTINUATIONS))
    assert dense["tasks"]["next"]["questions"] == 3


def test_the_table_and_the_bars_are_on_the_terminal(printed: tuple[str, str]) -> None:
    stdout, stderr = printed
    lines = [line.split() for line in stdout.splitlines() if line]
    methods = ["dense", "orthorank", "prune", "random"]
    assert [line[:2] for line in lines[2:18]] == [[k, name] for k in KINDS for name in methods]
    last = [line[0] for line in lines].index("method")
    assert [line[0] for line in lines[last + 1 : last + 5]] == methods
    assert f"prune: look-up, {PROMPT} tokens" in stderr
    assert "orthorank 0.2 (2 of 4): text: 100%" in stderr


def test_a_second_run_measures_nothing_again(
    printed: tuple[str, str], small_model_path: str, folder: Path
) -> None:
    before = json.loads((folder / "out" / "results.json").read_text())
    stdout, stderr = evaluate(small_model_path, folder)
    assert "segments" not in stderr
    assert "answers" not in stderr
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
        of_runs = ["dense", "orthorank 0.2", "prune 0.2", "random 0.2"]
        assert [cell.strip() for cell in cells][-4:] == of_runs
        assert [cell.strip() for cell in cells][1:5] == of_runs
        figures = page.locator("figure").all()
        assert [figure.get_attribute("id") for figure in figures] == [
            f"kl-{PROMPT}",
            "perplexity",
            "task-capitals",
            "task-next",
            "entries",
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


def test_layers_given_by_hand_are_one_run_and_need_no_profile(
    small_model_path: str, folder: Path, tmp_path: Path
) -> None:
    """The last layer's update is nothing that an answer reads, so that it alone costs nothing."""
    given = ["--dtype", "float32", "--data", str(folder / "test.txt"), "--length", "0"]
    given += ["--prompt-lens", str(PROMPT), "--answer-len", str(ANSWER), "--samples", "1"]
    given += ["--look-ups", "0", "--layers", "5:0", "--against", "none", "-o", str(tmp_path)]
    result = run(small_model_path, *given)
    assert result.returncode == 0, result.stderr
    dense, last = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert (dense["method"], last["method"], last["layers"]) == ("dense", "orthorank", [[5, 0]])
    assert last["ratio"] == pytest.approx(1 / 6)
    assert "perplexity" not in result.stdout
    for loss in last["served"][str(PROMPT)].values():
        assert loss["kl"] == pytest.approx(0, abs=1e-6)
        assert loss["same"] == 1


def test_a_profile_that_is_kept_for_other_weights_is_not_taken_for_these(
    small_model_path: str, folder: Path, tmp_path: Path
) -> None:
    """Break seen: a fine-tune evaluated with its base's layers, which no server takes."""
    given = read_profile(folder / "profile.json")
    path = kept_path(tmp_path, given.model["config_sha256"], "a" * 64, given.rule)
    replace(given, weights="a" * 64).write(path)
    plain = ["--dtype", "float32", "--data", str(folder / "test.txt"), "--length", "256"]
    plain += [
        "--stand-in",
        "off",
        "--ratios",
        "0",
        "--samples",
        "0",
        "--look-ups",
        "0",
        "-o",
        str(tmp_path / "out"),
    ]
    refused = run(small_model_path, *plain, VLLM_CACHE_ROOT=str(tmp_path))
    assert refused.returncode == 2
    assert "the profile mine was measured on other weights of this shape" in refused.stderr
    assert "run `orthorank calibrate` on these" in refused.stderr
    assert "Traceback" not in refused.stderr
    told = run(small_model_path, *plain, "--profile", str(path))
    assert told.returncode == 0, told.stderr
    assert "note: the profile mine was measured on other weights" in told.stderr
