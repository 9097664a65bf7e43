"""The selection's kernels against the sort, on a GPU or by Triton's interpreter."""

from dataclasses import replace

import numpy as np
import torch

from orthorank_vllm.options import DEFAULT_KEEP, DEFAULT_TAIL, DEFAULT_WINDOW
from orthorank_vllm.selection.plan import Batch, make_plan
from orthorank_vllm.selection.topk import SegmentedTopK, score, select
from orthorank_vllm.selection.topk_triton import SegmentedTopKTriton
from tests.support.random_batches import random_batch

HIDDEN = 70
CPU = torch.device("cpu")


def differing(seed: int) -> list[str]:
    """What is not the same for random batches, states and windows; ties among the scores too."""
    random = np.random.default_rng(seed)
    batch = random_batch(random)
    window, tail = int(random.choice([1, 3, 16, 100, 128])), int(random.choice([1, 8, 64]))
    keeps = random.choice([0.0, 0.1, 1 / 3, 0.8], size=2, replace=False).tolist()
    # As by requests that skip tokens in no layer, in some, and in all.
    batch = replace(batch, num_selective=random.integers(0, 3, len(batch.query_len)))
    plan = make_plan(batch, keeps, window, tail)
    if plan is None:
        return []
    torch.manual_seed(seed)
    # Few different states, so that many scores are equal.
    residual = torch.randn(4, HIDDEN)[torch.randint(4, (plan.num_tokens,))]
    table = torch.randn(7, HIDDEN)
    slots = torch.randint(7, (len(plan.requests),))
    arrays = [torch.from_numpy(array) for array in SegmentedTopKTriton.arrays_of(plan)]
    kernels = SegmentedTopKTriton.of_arrays(plan, arrays)
    sorted_out = SegmentedTopK.of(plan, CPU)
    wrong = [] if kernels.keys() == sorted_out.keys() else [f"seed {seed}: other quotas"]
    for quota, top_k in sorted_out.items():
        scores = score(residual, table[slots], top_k)
        expected = select(scores.round(decimals=4), top_k).tolist()
        found = kernels[quota].rows(residual, table, slots).tolist()
        if found != expected:
            wrong.append(f"seed {seed}: window {window}, {found} for {expected}")
        errors = torch.randint(-3, 4, (plan.num_tokens,)).float() * 40
        expected, found = (
            kind[quota].rows_by_error(errors).tolist() for kind in (sorted_out, kernels)
        )
        if found != expected:
            wrong.append(f"seed {seed}: by error, {found} for {expected}")
    return wrong


def share_that_differs(device: str, tokens: int = 8192, hidden: int = 4096) -> float:
    """The share of one long prompt's rows that the kernels choose and the sort does not."""
    zero, length = np.zeros(1, dtype=np.int64), np.full(1, tokens, dtype=np.int64)
    batch = Batch(zero, length, length, zero)
    plan = make_plan(batch, [DEFAULT_KEEP], DEFAULT_WINDOW, DEFAULT_TAIL)
    assert plan is not None
    torch.manual_seed(0)
    residual = torch.randn(tokens, hidden, dtype=torch.bfloat16).to(device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    chosen = []
    for kind in (SegmentedTopKTriton, SegmentedTopK):
        arrays = [torch.from_numpy(array).to(device) for array in kind.arrays_of(plan)]
        [top_k] = kind.of_arrays(plan, arrays).values()
        rows = top_k.rows(residual, residual[:1], slots)
        chosen.append(set(rows.tolist()))
    return len(chosen[0] - chosen[1]) / plan.scored[0].num_selected
