"""The sink's residual stream entering each layer that scores, per token id.

Position 0 attends only to itself, so its state depends on nothing but its token
id; the table serves the requests whose position 0 a forward lacks (a later
chunk, a prefix-cache hit, a resumed request). DESIGN: README.md, "The sink".
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property

import torch


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
        self._slot_of_token: OrderedDict[int, int] = OrderedDict()

    @cached_property
    def rows(self) -> torch.Tensor:
        """[layers that score, capacity, hidden], in the model's dtype.

        Made when first used, on a GPU by the profile run: vLLM 0.26 counts what that takes and
        what loading took, and nothing between, when layers may be chosen.
        """
        # Outlives the forward that makes it, and may be written to outside of one.
        with torch.inference_mode(False):
            return torch.zeros(self._shape, dtype=self._dtype, device=self._device)

    def reserve(self, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """A slot for each token id, all held at the same time.

        Args:
            tokens: token ids, repeats allowed, at most `capacity` different ones.

        Returns:
            the slots, and the token ids whose slots hold nothing yet.
        """
        wanted = dict.fromkeys(tokens)
        missing = [token for token in wanted if token not in self._slot_of_token]
        for token in wanted:
            if token in self._slot_of_token:
                self._slot_of_token.move_to_end(token)
        for token in missing:
            if len(self) < self._shape[1]:
                slot = len(self)
            else:
                _, slot = self._slot_of_token.popitem(last=False)
            self._slot_of_token[token] = slot
        return [self._slot_of_token[token] for token in tokens], missing

    def __contains__(self, token: int) -> bool:
        return token in self._slot_of_token

    def __len__(self) -> int:
        """How many token ids have a slot."""
        return len(self._slot_of_token)

    def clear(self) -> None:
        """Forget every state; to be called when the weights change."""
        self._slot_of_token.clear()
