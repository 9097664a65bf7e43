"""The selection's kernels against the sort, run by Triton's interpreter."""

import numpy as np
import torch

from orthorank_vllm.selection.plan import Batch, make_plan
from orthorank_vllm.selection.topk import SegmentedTopK, score, select
from orthorank_vllm.selection.topk_triton import SegmentedTopKTriton

HIDDEN = 70
CPU = torch.device("cpu")


def differing(seed: int) -> list[str]:
    """What is not the same for random batches, states and windows; ties among the scores too."""
    random = np.random.default_rng(seed)
    requests = int(random.integers(1, 6))
    prompt = random.integers(1, 200, requests)
    computed = np.where(random.random(requests) < 0.5, 0, random.integers(0, 220, requests))
    query = random.integers(1, 160, requests)
    computed, query, prompt = (array.astype(np.int64) for array in (computed, query, prompt))
    batch = Batch(computed, query, prompt, first_token=prompt)
    window = int(random.choice([1, 3, 16, 100, 128]))
    plan = make_plan(batch, float(random.choice([0.1, 1 / 3, 0.8])), window)
    if plan is None:
        return []
    torch.manual_seed(seed)
    # Few different states, so that many scores are equal; larger than any is the sink's own.
    residual = torch.randn(4, HIDDEN)[torch.randint(4, (plan.num_tokens,))]
    table = torch.randn(7, HIDDEN)
    slots = torch.randint(7, (len(plan.requests),))
    sorted_out = SegmentedTopK.of(plan, CPU)
    scores = score(residual, table[slots], sorted_out)
    arrays = [torch.from_numpy(array) for array in SegmentedTopKTriton.arrays_of(plan)]
    found = SegmentedTopKTriton.of_arrays(plan, arrays).rows(residual, table, slots)
    expected = select(scores.round(decimals=4), sorted_out)
    if found.tolist() == expected.tolist():
        return []
    return [f"seed {seed}: window {window}, {found.tolist()} for {expected.tolist()}"]
