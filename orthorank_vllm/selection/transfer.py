"""Host arrays on their way to the device."""

from collections.abc import Sequence

import numpy as np
import torch

from orthorank_vllm.selection.plan import Ints


def to_device(arrays: Sequence[Ints], device: torch.device) -> list[torch.Tensor]:
    """The arrays on the device, in one copy that nobody waits for.

    From pinned memory, which torch takes back once the copy is done: from any other, and with
    one copy for each array, the host would wait for the device at every forward.

    Args:
        arrays: int64, of one dimension.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    packed = torch.from_numpy(np.concatenate(arrays)).pin_memory()
    return list(packed.to(device, non_blocking=True).split([len(array) for array in arrays]))
