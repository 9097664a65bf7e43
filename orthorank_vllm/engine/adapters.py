"""LoRA adapters as vLLM's manager has them loaded: which are whose, in a step's rows.

vllm/lora/model_manager.py: `model.lora_manager`, once the model is loaded. Before a forward, each
runner has it load what the step's requests need, and tells it the adapter of each row.
"""

import itertools
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from orthorank_vllm.model.adapters import NO_SLOT, RowAdapters
from orthorank_vllm.selection.plan import Ints, Plan

# vLLM's name of the one model that has adapters, where there are no others to look at images.
LANGUAGE = "language_model"

_count = itertools.count(1)
_numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def numbers_of(ids: Ints, manager: Any) -> Ints | None:
    """A number for each request's adapter, 0 for none; None where none has one.

    An id may come to mean another adapter: one that is loaded in its place, or under the same id
    once it was unloaded. So a number is that of what is loaded.

    Args:
        ids: [requests] vLLM's, 0 for none; of adapters that are loaded.
        manager: the model's `LoRAModelManager`; not used where no request has an adapter.
    """
    if not ids.any():
        return None
    loaded = manager.list_adapters()
    different, places = np.unique(ids, return_inverse=True)
    numbers = [_number_of(loaded[adapter]) if adapter else 0 for adapter in different.tolist()]
    return np.array(numbers, dtype=np.int64)[places]


def _number_of(loaded: Any) -> int:
    if loaded not in _numbers:
        _numbers[loaded] = next(_count)
    return _numbers[loaded]


def adapters_of_step(model: Any, plan: Plan) -> RowAdapters | None:
    """The adapters of a forward's rows; None where none has one.

    Args:
        model: the whole one, that vLLM's manager knows.
    """
    if plan.batch.adapter is None:
        return None
    wrapper = model.lora_manager.punica_wrapper_mapping[LANGUAGE]
    return _of_slots(model.lora_manager, wrapper.token_lora_indices[: plan.num_tokens])


def no_adapters(model: Any, num_tokens: int, device: torch.device) -> RowAdapters | None:
    """Those of rows that have none, which take as much memory; None without `--enable-lora`."""
    manager = getattr(model, "lora_manager", None)
    if manager is None:
        return None
    slots = torch.full((num_tokens,), NO_SLOT, device=device)
    return _of_slots(manager, slots)


def _of_slots(manager: Any, slots: torch.Tensor) -> RowAdapters:
    config = manager.lora_config
    return RowAdapters.of_slots(slots, config.max_loras, config.max_lora_rank, config.lora_dtype)
