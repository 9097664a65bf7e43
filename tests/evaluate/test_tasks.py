"""Task files."""

import json
from pathlib import Path

import pytest

from orthorank_vllm.evaluate.tasks import read_task
from orthorank_vllm.options import OptionError

CHOICE = {"query": "Two and two are", "choices": ["four", "five"], "gold": 0}
CONTINUATION = {"context": "The cat sat on the", "continuation": "mat"}


def write(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_task_is_named_by_its_file(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "sums.jsonl", CHOICE, CHOICE))
    assert (task.name, len(task.records), task.is_choice) == ("sums", 2, True)


def test_only_a_posed_question_is_asked_for_its_answer(tmp_path: Path) -> None:
    posed = {**CHOICE, "query": "Question: What are two and two?"}
    config = read_task(write(tmp_path / "a.jsonl", posed)).config()
    assert config["doc_to_text"] == "{{query}}\nAnswer:"
    config = read_task(write(tmp_path / "b.jsonl", CHOICE)).config()
    assert config["doc_to_text"] == "{{query}}"


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
