"""Tasks: JSON lines, lm-eval's YAML files and its own names."""

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from orthorank_vllm.evaluate.tasks import LoadedTask, accuracies, load_tasks, read_task
from orthorank_vllm.offline.texts import TextScore
from orthorank_vllm.options import OptionError

CHOICE = {"query": "Two and two are", "choices": ["four", "five"], "gold": 0}
CONTINUATION = {"context": "The cat sat on the", "continuation": "mat"}
CHOICES = [{"query": f"{n} and {n} are", "choices": ["a", "bb", "c"], "gold": 1} for n in range(40)]
CONTINUATIONS = [{"context": f"The {n}", "continuation": "mat"} for n in range(40)]
MEAN = {"aggregation": "mean", "higher_is_better": True}
CHOICE_YAML = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
}
CONTINUATION_YAML = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{' ' + continuation}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc", **MEAN}],
}


def write(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_yaml(path: Path, data: str, config: dict[str, Any]) -> str:
    """A task of lm-eval's, named as its file, with its questions in another."""
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data}}}
    path.write_text(yaml.safe_dump({"task": path.stem, **files, "test_split": "test", **config}))
    return str(path)


class Letters:
    """A tokenizer whose tokens are characters."""

    eos_token_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def score(texts: Sequence[Sequence[int]], first_scored: Sequence[int]) -> list[TextScore]:
    """A model that thinks of each text what its checksum says."""
    sums = [zlib.crc32(bytes(text)) for text in texts]
    return [TextScore(-math.log(1 + number), number % 2 == 0) for number in sums]


def found_by(tasks: Sequence[LoadedTask], limit: int | None = None) -> dict[str, dict[str, Any]]:
    return accuracies(score, tasks, Letters(), 100, limit)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _data_sets_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    ("records", "config", "measured"),
    [
        (CHOICES, CHOICE_YAML, {"acc", "acc_norm", "stderr", "questions"}),
        (CONTINUATIONS, CONTINUATION_YAML, {"acc", "stderr", "questions"}),
    ],
)
@pytest.mark.parametrize("limit", [None, 10])
def test_questions_as_json_lines_and_as_a_task_of_lm_evals_give_the_same_accuracy(
    tmp_path: Path,
    records: list[object],
    config: dict[str, Any],
    measured: set[str],
    limit: int | None,
) -> None:
    data = write(tmp_path / "lines.jsonl", *records)
    tasks = load_tasks([data, write_yaml(tmp_path / "of_lm_eval.yaml", data, config)])
    found = found_by(tasks, limit)
    assert [task.name for task in tasks] == ["lines", "of_lm_eval"]
    assert found["of_lm_eval"] == found["lines"]
    assert set(found["lines"]) == measured
    assert 0 < found["lines"]["acc"] < 1
    assert found["lines"]["questions"] == (limit or len(records))


def test_a_task_is_another_once_its_questions_or_its_prompts_are(tmp_path: Path) -> None:
    data = write(tmp_path / "lines.jsonl", *CHOICES)
    moved = write(tmp_path / "moved.jsonl", *CHOICES)
    fewer = write(tmp_path / "fewer.jsonl", *CHOICES[1:])

    def hash_of(data: str, config: dict[str, Any]) -> str:
        [task] = load_tasks([write_yaml(tmp_path / "task.yaml", data, config)])
        return task.sha256

    before = hash_of(data, CHOICE_YAML)
    assert hash_of(moved, CHOICE_YAML) == before
    assert hash_of(fewer, CHOICE_YAML) != before
    assert hash_of(data, {**CHOICE_YAML, "doc_to_text": "{{query}} what?"}) != before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"output_type": "generate_until"}, "it has output_type generate_until, and only log-prob"),
        ({"output_type": "loglikelihood_rolling"}, "give tasks of output_type multiple_choice or"),
        ({"metric_list": [{"metric": "f1"}]}, "it has metrics f1; give tasks with the metric acc"),
        ({"unsafe_code": True}, "it needs images, sound, or code to be run"),
        ({"doc_to_target": "{{nothing.at.all}}"}, "lm-eval cannot load it ("),
        ({"dataset_path": "someone/somewhere"}, "give a task whose data is here or can be fetched"),
        ({"test_split": "train"}, "lm-eval cannot load it ("),
    ],
)
def test_what_is_wrong_with_a_task_of_lm_evals_is_said_in_one_line(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    data = write(tmp_path / "lines.jsonl", CHOICE)
    given = write_yaml(tmp_path / "task.yaml", data, {**CHOICE_YAML, **config})
    with pytest.raises(OptionError) as raised:
        load_tasks([given])
    assert str(raised.value).startswith(f"--tasks {given}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arc_hard", "neither a file nor a task of lm-eval; give a name that `lm-eval ls tasks`"),
        ("arc_easy", "lm-eval cannot load it (Couldn't reach 'allenai/ai2_arc' on the Hub"),
        ("nowhere.yaml", "neither a file nor a task of lm-eval"),
        ("nowhere.jsonl", "it cannot be read (No such file"),
        ("no/where", "it cannot be read (No such file"),
    ],
)
def test_a_name_that_cannot_be_had_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OptionError) as raised:
        load_tasks([name])
    assert str(raised.value).startswith(f"--tasks {name}: {message}")
    assert "\n" not in str(raised.value)


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "task.jsonl", CHOICE)
    given = [data, write_yaml(tmp_path / "task.yaml", data, CHOICE_YAML)]
    with pytest.raises(OptionError, match="two have the same name"):
        load_tasks(given)


def test_a_task_is_named_by_its_file(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "sums.jsonl", CHOICE, CHOICE))
    assert (task.name, len(task.task.eval_docs)) == ("sums", 2)


def test_only_a_posed_question_is_asked_for_its_answer(tmp_path: Path) -> None:
    posed = {**CHOICE, "query": "Question: What are two and two?"}
    task = read_task(write(tmp_path / "a.jsonl", posed)).task
    assert task.config.doc_to_text == "{{query}}\nAnswer:"
    task = read_task(write(tmp_path / "b.jsonl", CHOICE)).task
    assert task.config.doc_to_text == "{{query}}"


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ((), "it is empty"),
        ((CHOICE, [1]), "line 2 is not a JSON object"),
        (({"query": "q", "choices": ["a", "b"]},), "line 1 lacks gold; needed are query, choices"),
        (({"context": "c"},), "line 1 lacks continuation; needed are"),
        (({},), "line 1 lacks query and choices and gold"),
        (({**CHOICE, "gold": 2},), 'line 1 "gold" must be an index of its 2 choices, it is 2'),
        (({**CHOICE, "gold": True},), 'line 1 "gold" must be'),
        (({**CHOICE, "choices": ["four"]},), 'line 1 "choices" must be a list of two or more'),
        (({**CHOICE, "query": 4},), "line 1 holds a text that is no string"),
        ((CHOICE, CONTINUATION), "it mixes choices and continuations"),
    ],
)
def test_what_is_wrong_with_a_task_file_is_said_in_one_line(
    tmp_path: Path, records: tuple[object, ...], message: str
) -> None:
    path = write(tmp_path / "task.jsonl", *records)
    with pytest.raises(OptionError) as raised:
        read_task(path)
    assert str(raised.value).startswith(f"--tasks {path}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_binary_file_is_no_task(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_bytes(b"\xff\0")
    with pytest.raises(OptionError, match="it is not text"):
        read_task(str(path))
