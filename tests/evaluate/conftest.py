"""What the tests of `orthorank evaluate` share: a text, two tasks, a profile, and options."""

import json
from pathlib import Path

import pytest
import yaml

from orthorank_vllm.calibrate.text import built_in_text
from orthorank_vllm.profiles import Cost, Entry, Profile, model_identity

PROMPT, ANSWER = 200, 16
COSTS = {"cost": Cost({"prose": 0.1, "copy": 0.2}), "held_back": Cost({"prose": 0.2}, 0.5)}
ENTRIES = tuple(Entry(layer, 1 / 3, **COSTS) for layer in (3, 1, 4))
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
    data = {"calibration": {"name": "t", "sha256": "0" * 64, "samples": {"prose": 3}}}
    Profile("mine", model, ENTRIES, 128, 64, data=data).write(folder / "profile.json")
    return folder


def options(folder: Path) -> list[str]:
    return [
        *("--dtype", "float32", "--data", str(folder / "test.txt"), "--length", "256"),
        *("--ratios", "0,0.2", "--profile", str(folder / "profile.json")),
        *("--prompt-lens", str(PROMPT), "--answer-len", str(ANSWER)),
        *("--samples", "1", "--look-ups", "2"),
        *("-o", str(folder / "out")),
    ]


def tasks(folder: Path) -> list[str]:
    return ["--tasks", str(folder / "capitals.jsonl"), str(folder / "next.yaml")]
