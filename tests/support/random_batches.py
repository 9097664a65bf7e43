"""Steps of a server as its model runner plans them: prompts, chunks and decoding, mixed."""

import numpy as np

from orthorank_vllm.selection.plan import Batch


def random_batch(random: np.random.Generator, longest: int = 200) -> Batch:
    """One to five requests, each anywhere between its prompt's start and its answer's end.

    Args:
        longest: tokens of a prompt, of a request's cached part and of its part in this step.
    """
    requests = int(random.integers(1, 6))
    prompt, query = random.integers(1, longest, (2, requests))
    computed = np.where(random.random(requests) < 0.5, 0, random.integers(0, longest, requests))
    return Batch(computed.astype(np.int64), query.astype(np.int64), prompt.astype(np.int64), prompt)
