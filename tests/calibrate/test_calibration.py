"""A calibration and its course: the samples, and measurements that outlive a process."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from orthorank_vllm.calibrate.calibration import (
    SAMPLES,
    SCOUTS,
    Calibration,
    Course,
    measurements_of,
    read_measurements,
)
from orthorank_vllm.calibrate.kinds import KINDS, Sample
from orthorank_vllm.calibrate.text import built_in_text, held_back_text
from orthorank_vllm.offline import worker_calls
from orthorank_vllm.offline.served import AnswerLoss
from orthorank_vllm.options import OptionError
from orthorank_vllm.profiles import Entry, read_profile
from orthorank_vllm.selection.method import Method
from tests.calibrate.written_losses import WrittenTrial, layers_cost

COSTS = [0.3, 0.1, 0.2, 0.05]


def calibration_of(model_path: str, positions: int = 8192, **changed: Any) -> Calibration:
    """Of a model's folder, whose weights are not loaded."""
    hf_config = AutoConfig.from_pretrained(model_path, max_position_embeddings=positions)
    model_config = SimpleNamespace(model=model_path, dtype=torch.float32, hf_text_config=hf_config)
    given: dict[str, Any] = {"tokenizer": AutoTokenizer.from_pretrained(model_path)}
    given |= {"method": Method(), "text": built_in_text(), "held_back": held_back_text()}
    return Calibration.of(model_config, **{**given, **changed})


@pytest.fixture(scope="module")
def usual(model_path: str) -> Calibration:
    return calibration_of(model_path)


def counts(samples: Sequence[Sample]) -> dict[str, int]:
    return {kind: sum(sample.kind == kind for sample in samples) for kind in KINDS}


def test_every_kind_is_there_and_layers_are_looked_at_alone_on_some_of_the_samples(
    usual: Calibration,
) -> None:
    assert counts(usual.texts["calibration"]) == SAMPLES
    assert counts(usual.texts["scout"]) == {**dict.fromkeys(KINDS, 0), **SCOUTS}
    assert set(usual.texts["scout"]) <= set(usual.texts["calibration"])
    assert not set(usual.texts["held_back"]) & set(usual.texts["calibration"])
    for sample in usual.texts["calibration"]:
        assert 632 <= sample.prompt_len <= 640
        assert sum(end - start for start, end in sample.scored) == sample.num_scored > 0


def test_a_profile_holds_what_it_was_measured_on_and_can_be_read_again(
    usual: Calibration, tmp_path: Path
) -> None:
    measured = replace(usual, weights="1" * 64)
    profile = measured.profile_of([Entry(3, 0.0)])
    profile.write(tmp_path / "p.json")
    assert read_profile(tmp_path / "p.json") == profile
    assert profile.identity == measured.identity
    assert profile.data is not None
    assert profile.data["calibration"]["samples"] == SAMPLES
    assert profile.name == "SmolLM2-135M-Instruct"


def test_a_number_of_samples_is_of_each_kind(model_path: str) -> None:
    few = calibration_of(model_path, samples=1)
    assert counts(few.texts["calibration"]) == dict.fromkeys(KINDS, 1)
    assert counts(few.texts["held_back"]) == dict.fromkeys(KINDS, 1)


def test_without_a_chat_template_there_is_no_chat(model_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.chat_template = None
    found = calibration_of(model_path, tokenizer=tokenizer, samples=1)
    assert "chat" not in found.data["calibration"]["samples"]
    assert counts(found.texts["scout"])["chat"] == 0


def test_a_model_with_too_few_positions_is_named(model_path: str) -> None:
    with pytest.raises(OptionError, match=r"measured on 896 tokens, and it has 895 positions"):
        calibration_of(model_path, positions=895)


class WrittenWorkers:
    """Loaded workers whose losses are written down."""

    def __init__(self) -> None:
        self._trials: dict[str, WrittenTrial] = {}
        self._current = WrittenTrial([], lambda _: 0.0)

    def call(self, function: Callable[..., Any], *args: Any) -> list[AnswerLoss] | None:
        if function is worker_calls.use_texts:
            name, samples, *_ = args
            self._trials[name] = WrittenTrial(samples, layers_cost(COSTS))
            return self._trials[name].dense
        if function is worker_calls.start_step:
            name, chosen = args
            self._current = self._trials[name]
            self._current.start_step(chosen)
            return None
        assert function is worker_calls.losses_with
        return self._current.losses_with(*args)

    @property
    def num_tried(self) -> int:
        return sum(len(trial.tried) for trial in self._trials.values())


def course_of(calibration: Calibration, path: Path | None, **given: Any) -> Course:
    return Course(calibration, WrittenWorkers(), path, **given)  # type: ignore[arg-type]


@pytest.fixture
def small(usual: Calibration) -> Calibration:
    return replace(usual, model={**usual.model, "num_hidden_layers": 4}, weights="1" * 64)


def run(course: Course) -> list[Entry]:
    search = course.search()
    search.run(0.9)
    course.end_trial()
    return search.entries


def num_tried(course: Course) -> int:
    workers: Any = course.workers
    return int(workers.num_tried)


def test_what_was_measured_is_kept_after_each_trial_and_taken_up_again(
    small: Calibration, tmp_path: Path
) -> None:
    path = measurements_of(tmp_path / "new" / "p.json")
    assert path.name == "p.json.measured"
    whole = course_of(small, None)
    entries = run(whole)
    told: list[int] = []
    kept: list[int] = []

    def stop() -> None:
        if path.exists():
            content = json.loads(path.read_text())["measured"].values()
            kept.append(sum(len(each["known"]) for each in content))
        if stopped.trials == 7:
            raise KeyboardInterrupt

    stopped = course_of(small, path, before_trial=stop, on_trial=lambda: told.append(1))
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    assert kept == sorted(kept)
    assert kept[-1] == num_tried(stopped) > 0
    assert len(told) == 6

    left = course_of(small, path)
    assert run(left) == entries
    assert num_tried(left) == num_tried(whole) - num_tried(stopped)
    again = course_of(small, path)
    assert run(again) == entries
    assert (again.trials, num_tried(again)) == (0, 0)


@pytest.mark.parametrize("name", ["weights", "dtype", "method", "data", "texts"])
def test_measurements_of_another_calibration_are_not_taken(
    small: Calibration, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "p.json.measured"
    whole = course_of(small, path)
    run(whole)
    others: dict[str, Any] = {
        "weights": "2" * 64,
        "dtype": "bfloat16",
        "method": Method(tail=32),
        "data": {**small.data, "held_back": {}},
        # Those that another tokenizer makes of the same text.
        "texts": {
            key: [replace(sample, tokens=sample.tokens[::-1]) for sample in samples]
            for key, samples in small.texts.items()
        },
    }
    other = course_of(replace(small, **{name: others[name]}), path)
    run(other)
    assert num_tried(other) == num_tried(whole)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": 1}', "\0"])
def test_a_file_that_holds_no_measurements_is_as_none(
    small: Calibration, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "p.json.measured"
    path.write_text(content)
    assert read_measurements(path, small.identity) == {}
    path.unlink()
    assert read_measurements(path, small.identity) == {}


def test_where_nothing_can_be_kept_a_search_ends_or_goes_on_and_says_so_once(
    small: Calibration, tmp_path: Path
) -> None:
    (tmp_path / "folder").write_text("in the way")
    path = tmp_path / "folder" / "p.json.measured"
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        run(course_of(small, path))
    told: list[OSError] = []
    unkept = course_of(small, path, on_unkept=told.append)
    assert run(unkept) == run(course_of(small, None))
    assert len(told) == 1
    assert unkept.path is None
