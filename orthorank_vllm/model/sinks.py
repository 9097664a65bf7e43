"""The sink's residual stream entering each layer that scores, per token id and adapter.

Position 0 attends only to itself, so its state depends on nothing but its token id, or what
embedding a prompt begins with instead, and on the adapter that its request may have; the table
serves the requests whose position 0 a forward lacks (a later chunk, a prefix-cache hit, a resumed
request). DESIGN: README.md, "The sink".
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import TypeVar

import torch

Sink = TypeVar("Sink", bound=Hashable)


class SinkTable:
    """A small least-recently-used table on the device."""

    def __init__(
        self,
        num_layers: int,
        capacity: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shape = (num_layers, capacity, hidden_size)
        self._dtype = dtype
        self._device = device
        self._slot_of: OrderedDict[Hashable, int] = OrderedDict()

    @cached_property
    def rows(self) -> torch.Tensor:
        """[layers that score, capacity, hidden], in the model's dtype.

        Made when first used, on a GPU by the profile run: vLLM 0.26 counts what that takes and
        what loading took, and nothing between, when layers may be chosen.
        """
        # Outlives the forward that makes it, and may be written to outside of one.
        with torch.inference_mode(False):
            return torch.zeros(self._shape, dtype=self._dtype, device=self._device)

    def reserve(self, sinks: Sequence[Sink]) -> tuple[list[int], list[Sink]]:
        """A slot for each sink, all held at the same time.

        Args:
            sinks: what a state depends on, repeats allowed, at most `capacity` different ones.

        Returns:
            the slots, and the sinks whose slots hold nothing yet.
        """
        wanted = dict.fromkeys(sinks)
        missing = [sink for sink in wanted if sink not in self._slot_of]
        for sink in wanted:
            if sink in self._slot_of:
                self._slot_of.move_to_end(sink)
        for sink in missing:
            if len(self) < self._shape[1]:
                slot = len(self)
            else:
                _, slot = self._slot_of.popitem(last=False)
            self._slot_of[sink] = slot
        return [self._slot_of[sink] for sink in sinks], missing

    def __contains__(self, sink: Hashable) -> bool:
        return sink in self._slot_of

    def __len__(self) -> int:
        """How many sinks have a slot."""
        return len(self._slot_of)

    def clear(self) -> None:
        """Forget every state; to be called when the weights change."""
        self._slot_of.clear()
