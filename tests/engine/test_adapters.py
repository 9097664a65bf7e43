"""Which adapter a request has, by what vLLM's manager has loaded."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from orthorank_vllm.engine.adapters import adapters_of_step, no_adapters, numbers_of
from orthorank_vllm.selection.plan import Batch, make_plan

LENGTHS = np.array([100, 3, 120])
NOTHING = np.zeros_like(LENGTHS)


class Loaded:
    """Stands for vLLM's `LoRAModel`."""


class Manager:
    """What is asked of vLLM's `LoRAModelManager`; its wrapper tells more rows than are computed."""

    def __init__(self, **loaded: Loaded) -> None:
        self.loaded = {int(name[1:]): model for name, model in loaded.items()}
        self.lora_config = SimpleNamespace(max_loras=4, max_lora_rank=2, lora_dtype=torch.float32)
        slots = torch.tensor([2, -1, 0, 3]).repeat_interleave(torch.tensor([*LENGTHS, 5]))
        wrapper = SimpleNamespace(token_lora_indices=slots)
        self.punica_wrapper_mapping = {"language_model": wrapper}

    def list_adapters(self) -> dict[int, Loaded]:
        return dict(self.loaded)


def test_an_adapter_under_anothers_id_has_another_number() -> None:
    """Break seen: the id itself."""
    manager = Manager(_3=Loaded(), _7=Loaded())
    ids = np.array([7, 0, 3, 7])
    first = numbers_of(ids, manager)
    assert first is not None
    assert first[1] == 0
    assert len({*first.tolist()}) == 3
    assert first[0] == first[3]
    again = numbers_of(ids, manager)
    assert again is not None
    assert again.tolist() == first.tolist()
    manager.loaded[7] = Loaded()
    renewed = numbers_of(ids, manager)
    assert renewed is not None
    assert renewed[2] == first[2]
    assert renewed[0] not in first.tolist()


def test_without_adapters_there_is_no_number() -> None:
    """Nor is there a manager, where adapters are not enabled."""
    assert numbers_of(np.zeros(4, dtype=np.int64), None) is None


@pytest.fixture
def model() -> Any:
    return SimpleNamespace(lora_manager=Manager(_1=Loaded()))


def test_a_steps_rows_have_the_adapters_that_vllm_told(model: Any) -> None:
    batch = Batch(NOTHING, LENGTHS, LENGTHS, NOTHING, adapter=np.array([1, 0, 2]))
    plan = make_plan(batch, [0.0], 0, 1)
    assert plan is not None
    adapters = adapters_of_step(model, plan)
    assert adapters is not None
    assert adapters.slots.tolist() == [2] * 100 + [-1] * 3 + [0] * 120
    assert adapters.columns[0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert not adapters.columns[100:103].any()


def test_a_step_without_adapters_asks_vllm_nothing() -> None:
    plan = make_plan(Batch(NOTHING, LENGTHS, LENGTHS, NOTHING), [0.0], 0, 1)
    assert plan is not None
    assert adapters_of_step(None, plan) is None


def test_the_profile_run_takes_the_memory_of_adapters_where_there_may_be_some(model: Any) -> None:
    adapters = no_adapters(model, 50, torch.device("cpu"))
    assert adapters is not None
    assert adapters.columns.shape == (50, 8)
    assert not adapters.columns.any()
    assert no_adapters(SimpleNamespace(), 50, torch.device("cpu")) is None
