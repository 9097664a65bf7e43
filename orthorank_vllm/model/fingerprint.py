"""Which weights a model has: its configuration is the same for a fine-tune and its base.

Taken from the checkpoint's tensors on their way into the model, by their names there: before they
are cut among ranks, quantised or converted, so that it depends on none of these. Samples of every
tensor, since a fine-tune may change some projections alone (a merged LoRA leaves embeddings and
norms as they were). With expert parallelism, and by vLLM's loader for bitsandbytes, a rank may be
handed its own part only; the first one's fingerprint counts.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

# Per tensor: enough that a change of a few percent of its values is seen in some tensor, and few
# enough to cost nothing beside reading them (0.03 ms).
SAMPLES = 256
# How formats are called whose weights are random numbers until somebody sends others: vLLM's own,
# and those that trainers register (`dummy_dtensor`).
WITHOUT_WEIGHTS = "dummy"


def loads_weights(load_config: Any) -> bool:
    """Whether a start loads what the model was trained to.

    Args:
        load_config: vLLM's `LoadConfig`.
    """
    return not str(load_config.load_format).startswith(WITHOUT_WEIGHTS)


class Fingerprint:
    """What tells one model's weights from others; those handed later replace their like."""

    def __init__(self) -> None:
        self._of_tensor: dict[str, bytes] = {}
        self._is_complete = True

    def noting(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass weights on, each noted."""
        for name, tensor in weights:
            if type(tensor) in (torch.Tensor, torch.nn.Parameter):
                self._of_tensor[name] = _digest(name, tensor)
            else:
                # A subclass of torch's, such as a quantised one, need not let itself be sampled.
                self._is_complete = False
            yield name, tensor

    @property
    def value(self) -> str | None:
        """64 hexadecimal digits; None where no weights passed, as with formats that map them."""
        if not self._of_tensor or not self._is_complete:
            return None
        whole = hashlib.sha256()
        for name in sorted(self._of_tensor):
            whole.update(self._of_tensor[name])
        return whole.hexdigest()


def _digest(name: str, tensor: torch.Tensor) -> bytes:
    values = tensor.detach().reshape(-1)
    # Odd: a step that divides the rows would see one column of them only.
    step = max(1, values.numel() // SAMPLES) | 1
    sample = values[::step].cpu().contiguous().view(torch.uint8)
    head = f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode()
    return hashlib.sha256(head + sample.numpy().tobytes()).digest()
