"""Zero-shot accuracy by lm-eval: of its own tasks, of task YAML files, and of JSON lines.

A JSON-lines file holds one question a line: "query", "choices" and "gold" (the index
of the right choice), or "context" and "continuation" (the words that must follow).
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from orthorank_vllm.calibrate.text import json_lines, read_utf8
from orthorank_vllm.evaluate.perplexity import Scorer
from orthorank_vllm.options import OptionError

SCORED = ("multiple_choice", "loglikelihood")
CHOICE_KEYS = ("query", "choices", "gold")
CONTINUATION_KEYS = ("context", "continuation")
# ARC's questions are posed so, and its stock task then asks for the answer.
QUESTION = "Question:"


@dataclass(frozen=True)
class LoadedTask:
    """A task with its questions.

    Attributes:
        sha256: of the JSON-lines file, or of the configuration and the questions.
        task: lm-eval's.
    """

    name: str
    sha256: str
    task: Any


def load_tasks(given: Sequence[str]) -> list[LoadedTask]:
    """Load what `--tasks` names; a group or a tag of lm-eval's stands for its tasks.

    Args:
        given: names of lm-eval's, paths of its YAML files, paths of JSON lines.

    Raises:
        OptionError: the first that cannot be scored.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [value for value in given if _is_name(value)]
    # It reads all that lm-eval brings along, which takes seconds.
    manager = TaskManager(include_defaults=bool(names))
    tasks: list[LoadedTask] = []
    for value in given:
        if value in names or _is_yaml(value):
            tasks += _tasks_of_lm_eval(manager, value)
        else:
            tasks.append(read_task(value))
    if len({task.name for task in tasks}) < len(tasks):
        raise OptionError(f"--tasks {' '.join(given)}: two have the same name")
    return tasks


def _is_yaml(value: str) -> bool:
    return value.endswith((".yaml", ".yml"))


def _is_name(value: str) -> bool:
    is_path = os.sep in value or value.endswith((".jsonl", ".json")) or Path(value).is_file()
    return not is_path and not _is_yaml(value)


def _tasks_of_lm_eval(manager: TaskManager, value: str) -> list[LoadedTask]:
    if value not in manager.all_tasks and not Path(value).is_file():
        raise OptionError(
            f"--tasks {value}: neither a file nor a task of lm-eval; give a name that `lm-eval ls "
            "tasks` lists, the YAML file of a task, or JSON lines"
        )
    try:
        tasks = manager.load([value])["tasks"]
    except Exception as error:  # whatever its many tasks and their data sets raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OptionError(
            f"--tasks {value}: lm-eval cannot load it ({reason}); give a task whose data is here "
            "or can be fetched, or its data as JSON lines"
        ) from None
    for name, task in tasks.items():
        problem = _problem_of_task(task)
        if problem:
            of = "it" if name == value or _is_yaml(value) else name
            raise OptionError(f"--tasks {value}: {of} {problem}")
    return [LoadedTask(name, _hash_of(task), task) for name, task in tasks.items()]


def _problem_of_task(task: Any) -> str | None:
    if task.OUTPUT_TYPE not in SCORED:
        return (
            f"has output_type {task.OUTPUT_TYPE}, and only log-probabilities of given answers are "
            f"scored; give tasks of output_type {' or '.join(SCORED)}"
        )
    if "acc" not in task.aggregation():
        return f"has metrics {', '.join(task.aggregation())}; give tasks with the metric acc"
    if getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
        return "needs images, sound, or code to be run; give tasks of text alone"
    return None


def _hash_of(task: Any) -> str:
    # Where the data lies does not matter; a function's address differs from run to run.
    content = [{**task.dump_config(), "dataset_kwargs": None}, list(task.eval_docs)]
    told = json.dumps(content, default=lambda value: getattr(value, "__qualname__", str(value)))
    return hashlib.sha256(told.encode()).hexdigest()


def read_task(path: str) -> LoadedTask:
    """A task of JSON lines, named by its file.

    Raises:
        OptionError: not there, empty, not JSON lines, or a line that lacks a key.
    """
    content, sha256 = read_utf8(path, "--tasks", "JSON lines")
    records = []
    for number, record in json_lines(content):
        problem = _problem_of(record)
        if problem:
            raise OptionError(f"--tasks {path}: line {number} {problem}")
        records.append(record)
    if not records:
        raise OptionError(f"--tasks {path}: it is empty; give JSON lines")
    if len({"choices" in record for record in records}) > 1:
        raise OptionError(f"--tasks {path}: it mixes choices and continuations; give one kind")
    task = ConfigurableTask(config=_config(Path(path).stem, records))
    return LoadedTask(Path(path).stem, sha256, task)


def _config(name: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """A configuration for lm-eval (its docs/task_guide.md), the prompts those of its own tasks."""
    common = {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(records)},
        "test_split": "test",
    }
    if "choices" in records[0]:
        asks = records[0]["query"].startswith(QUESTION)
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


class ScoringLM(TemplateLM):
    """Scores a continuation as a served answer: dense, after its context as the prompt."""

    def __init__(self, scorer: Scorer, tokenizer: Any, max_length: int) -> None:
        super().__init__()
        self._scorer = scorer
        self.tokenizer = tokenizer
        self._max_length = max_length

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return list(self.tokenizer.encode(string))

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        texts, first_scored = [], []
        for _, context, continuation in requests:
            text = (context + continuation)[-self._max_length :]
            texts.append(text)
            first_scored.append(max(1, len(text) - len(continuation)))
        scores = self._scorer(texts, first_scored)
        return [(score.log_prob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("perplexity is measured without lm-eval")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("tasks are scored, nothing is generated")


def accuracies(
    scorer: Scorer,
    tasks: Sequence[LoadedTask],
    tokenizer: Any,
    max_length: int,
    limit: int | None,
) -> dict[str, dict[str, Any]]:
    """Measure by task "acc", "acc_norm" where it has one, "stderr" and "questions"."""
    results = simple_evaluate(
        model=ScoringLM(scorer, tokenizer, max_length),
        tasks=[task.task for task in tasks],
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        log_samples=False,
        bootstrap_iters=0,
    )
    assert results is not None
    found = {}
    for task in tasks:
        # Its keys are "acc,none", with the name of a filter.
        metrics = {k.partition(",")[0]: v for k, v in results["results"][task.name].items()}
        questions = results["n-samples"][task.name]["effective"]
        acc = float(metrics["acc"])
        found[task.name] = {
            "acc": acc,
            "stderr": (acc * (1 - acc) / max(questions - 1, 1)) ** 0.5,
            "questions": questions,
        }
        if "acc_norm" in metrics:
            found[task.name]["acc_norm"] = float(metrics["acc_norm"])
    return found
