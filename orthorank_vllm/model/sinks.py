"""The sink's residual stream entering each layer that scores, per token id.

Position 0 attends only to itself, so its state depends on nothing but its token
id; the table serves the requests whose position 0 a forward lacks (a later
chunk, a prefix-cache hit, a resumed request). DESIGN: README.md, "The sink".
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch


class SinkTable:
    """A small least-recently-used table on the device.

    Attributes:
        rows: [layers that score, capacity, hidden], in the model's dtype.
    """

    def __init__(
        self,
        num_layers: int,
        capacity: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.rows = torch.zeros(num_layers, capacity, hidden_size, dtype=dtype, device=device)
        self._slot_of_token: OrderedDict[int, int] = OrderedDict()

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
            if len(self) < self.rows.shape[1]:
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
