"""How one program of the attention kernel walks through its keys, by the memory that it has."""

import functools

import torch

KEYS = 64
LEAST_KEYS = 16
STAGES = 3
WARPS = 8
# For one program, in bytes, on GPUs that have little of it (an L4, an A10).
SMALL_SHARED_MEMORY = 99 * 1024


def loop_of(rows: int, row_bytes: int, shared_memory: int) -> tuple[int, int]:
    """Keys of one step of the loop over them, and stages of its pipeline: what there is room for.

    Args:
        row_bytes: of a query, and of a key or a value once it is as wide.
        shared_memory: of one program, in bytes.
    """
    stages = STAGES if shared_memory > 1.5 * SMALL_SHARED_MEMORY else STAGES - 1
    keys = KEYS
    while keys > LEAST_KEYS and (rows + 2 * stages * keys) * row_bytes > shared_memory:
        keys //= 2
    return keys, stages


# The driver is asked once, not by each layer of each step.
@functools.cache
def shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return SMALL_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", SMALL_SHARED_MEMORY))
