"""What a worker does to its weights, and what its model is told of it."""

from types import SimpleNamespace
from typing import Any

import pytest

from orthorank_vllm.engine import weights


class Worker:
    """Of a vLLM without a session for new weights; told of each change in order."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def get_model(self) -> Any:
        return self._model

    def reload_weights(self, told: list[str]) -> str:
        told.append("reloaded")
        return "answer"

    def wake_up(self, told: list[str]) -> None:
        told.append("awake")


@pytest.fixture(autouse=True)
def hooked() -> None:
    for _ in range(2):
        weights.hook(Worker)


def test_whatever_may_change_the_weights_is_followed_by_forgetting_once() -> None:
    told: list[str] = []
    model = SimpleNamespace(
        orthorank=SimpleNamespace(weights_changed=lambda: told.append("forgotten"))
    )
    worker = Worker(model)
    assert worker.reload_weights(told) == "answer"
    worker.wake_up(told)
    assert told == ["reloaded", "forgotten", "awake", "forgotten"]


def test_a_stock_model_is_left_alone() -> None:
    told: list[str] = []
    Worker(SimpleNamespace()).reload_weights(told)
    assert told == ["reloaded"]
