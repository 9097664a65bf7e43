"""The selection's kernels against the sort, on a GPU or by Triton's interpreter."""

import numpy as np
import torch

from orthorank_vllm.options import DEFAULT_KEEP, DEFAULT_WINDOW
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


def share_that_differs(device: str, tokens: int = 8192, hidden: int = 4096) -> float:
    """The share of one long prompt's rows that the kernels choose and the sort does not."""
    zero, length = np.zeros(1, dtype=np.int64), np.full(1, tokens, dtype=np.int64)
    plan = make_plan(Batch(zero, length, length, zero), DEFAULT_KEEP, DEFAULT_WINDOW)
    assert plan is not None
    torch.manual_seed(0)
    residual = torch.randn(tokens, hidden, dtype=torch.bfloat16).to(device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    chosen = []
    for kind in (SegmentedTopKTriton, SegmentedTopK):
        arrays = [torch.from_numpy(array).to(device) for array in kind.arrays_of(plan)]
        rows = kind.of_arrays(plan, arrays).rows(residual, residual[:1], slots)
        chosen.append(set(rows.tolist()))
    return len(chosen[0] - chosen[1]) / plan.num_selected
