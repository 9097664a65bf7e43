"""Zero-shot accuracy on local files, by lm-eval.

A file holds one question a line, as JSON: "query", "choices" and "gold" (the index
of the right choice), or "context" and "continuation" (the words that must follow).
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthorank_vllm.evaluate.scorer import Scorer
from orthorank_vllm.options import OptionError

CHOICE_KEYS = ("query", "choices", "gold")
CONTINUATION_KEYS = ("context", "continuation")
# ARC's questions are posed so, and its stock task then asks for the answer.
QUESTION = "Question:"


@dataclass(frozen=True)
class TaskFile:
    """A task: its name, the file's stem, and its questions."""

    name: str
    sha256: str
    records: list[dict[str, Any]]

    @property
    def is_choice(self) -> bool:
        return "choices" in self.records[0]

    def config(self) -> dict[str, Any]:
        """As lm-eval takes it (its docs/task_guide.md), the prompts those of its stock tasks."""
        from datasets import Dataset

        common = {
            "task": self.name,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(self.records)},
            "test_split": "test",
        }
        if self.is_choice:
            asks = self.records[0]["query"].startswith(QUESTION)
            return {
                **common,
                "output_type": "multiple_choice",
                "doc_to_text": "{{query}}\nAnswer:" if asks else "{{query}}",
                "doc_to_target": "gold",
                "doc_to_choice": "choices",
                "metric_list": [_mean("acc"), _mean("acc_norm")],
            }
        return {
            **common,
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{' ' + continuation}}",
            "target_delimiter": "",
            "metric_list": [_mean("acc")],
        }


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def read_task(path: str) -> TaskFile:
    """
    Raises:
        OptionError: not there, empty, not JSON lines, or a line that lacks a key.
    """
    try:
        raw = Path(path).read_bytes()
        lines = raw.decode().splitlines()
    except OSError as error:
        raise OptionError(f"--tasks {path}: it cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise OptionError(f"--tasks {path}: it is not text; give JSON lines") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            record = _parse(line)
            problem = _problem_of(record)
            if problem:
                raise OptionError(f"--tasks {path}: line {number} {problem}")
            records.append(record)
    if not records:
        raise OptionError(f"--tasks {path}: it is empty; give JSON lines")
    if len({"choices" in record for record in records}) > 1:
        raise OptionError(f"--tasks {path}: it mixes choices and continuations; give one kind")
    return TaskFile(Path(path).stem, hashlib.sha256(raw).hexdigest(), records)


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _problem_of(record: Any) -> str | None:
    if not isinstance(record, dict):
        return "is not a JSON object"
    keys = CONTINUATION_KEYS if "context" in record else CHOICE_KEYS
    missing = [key for key in keys if key not in record]
    if missing:
        return (
            f"lacks {' and '.join(missing)}; needed are {', '.join(CHOICE_KEYS)}, or "
            f"{' and '.join(CONTINUATION_KEYS)}"
        )
    if keys == CONTINUATION_KEYS:
        texts: list[Any] = [record["context"], record["continuation"]]
    else:
        choices, gold = record["choices"], record["gold"]
        if not isinstance(choices, list) or len(choices) < 2:
            return '"choices" must be a list of two or more'
        if type(gold) is not int or not 0 <= gold < len(choices):
            return f'"gold" must be an index of its {len(choices)} choices, it is {gold!r}'
        texts = [record["query"], *choices]
    return (
        None if all(isinstance(text, str) for text in texts) else "holds a text that is no string"
    )


def accuracies(
    scorer: Scorer,
    tasks: Sequence[TaskFile],
    tokenizer: Any,
    max_length: int,
    limit: int | None,
    on_texts: Callable[[int], Any] = lambda count: None,
) -> dict[str, dict[str, Any]]:
    """By task: "acc", "acc_norm" where choices differ in length, "stderr" and "questions"."""
    # lm-eval asks the hub for nothing here; without these it would still try.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval import simple_evaluate

    from orthorank_vllm.evaluate.lm import ScoringLM

    results = simple_evaluate(
        model=ScoringLM(scorer, tokenizer, max_length, on_texts),
        tasks=[task.config() for task in tasks],
        limit=limit,
        log_samples=False,
        bootstrap_iters=0,
    )
    assert results is not None
    found = {}
    for task in tasks:
        metrics = results["results"][task.name]
        questions = min(limit or len(task.records), len(task.records))
        acc = float(metrics["acc,none"])
        found[task.name] = {
            "acc": acc,
            "stderr": (acc * (1 - acc) / max(questions - 1, 1)) ** 0.5,
            "questions": questions,
        }
        if "acc_norm,none" in metrics:
            found[task.name]["acc_norm"] = float(metrics["acc_norm,none"])
    return found
