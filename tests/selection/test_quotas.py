"""Requests that skip tokens in different layers, against each request by itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthorank_vllm.selection.plan import Batch, make_plan
from orthorank_vllm.selection.quotas import Quota
from orthorank_vllm.selection.topk import SegmentedTopK, select

THIRD = 1 / 3
CPU = torch.device("cpu")

# Tokens computed, tokens in this forward, prompt length, selective layers.
REQUESTS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 60), st.integers(1, 60), st.integers(0, 4)),
    min_size=1,
    max_size=6,
)
KEEPS = st.lists(st.sampled_from([0.0, 0.25, THIRD, 0.9]), min_size=1, max_size=4)


def batch_of(requests: list[tuple[int, int, int, int]]) -> Batch:
    computed, query_len, prompt_len, selective = np.array(requests, dtype=np.int64).T
    return Batch(computed, query_len, prompt_len, computed, num_selective=selective)


def by_loops(
    request: tuple[int, int, int, int],
    scores: list[float],
    place: int,
    keep: float,
    window: int,
    tail: int,
) -> list[int]:
    """The rows that one request's part of a layer computes, counted from its first."""
    computed, length, prompt_len, selective = request
    rows = range(length)
    if place >= selective:
        return list(rows)
    chosen = []
    rivals: dict[int, list[int]] = {}
    for row in rows:
        position = computed + row
        if position == 0 or position >= prompt_len - tail:
            chosen.append(row)
        else:
            rivals.setdefault(position // window if window else 0, []).append(row)
    for segment in rivals.values():
        best = sorted(segment, key=lambda row: (scores[row], row))
        chosen += best[: math.ceil(keep * len(segment) - 1e-9)]
    return sorted(chosen)


def rows_of(
    quota: Quota | None, top_k: dict[Quota, SegmentedTopK], scores: torch.Tensor
) -> list[int]:
    """The rows that a layer computes."""
    if quota is None:
        return list(range(len(scores)))
    if quota.rows is not None:
        return [int(row) for row in quota.rows]
    found = select(scores[top_k[quota].candidates], top_k[quota]).tolist()
    return [int(row) for row in found]


@given(REQUESTS, KEEPS, st.sampled_from([0, 1, 7, 16]), st.sampled_from([1, 9, 40]), st.data())
def test_each_request_computes_in_each_layer_what_it_would_by_itself(
    requests: list[tuple[int, int, int, int]],
    keeps: list[float],
    window: int,
    tail: int,
    data: st.DataObject,
) -> None:
    """Breaks seen: a layer too many; those of one keep alike whoever skips in them."""
    batch = batch_of(requests)
    plan = make_plan(batch, keeps, window, tail)
    tokens = int(batch.query_len.sum())
    # Few different ones, so that many are equal.
    scores = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=tokens, max_size=tokens))
    top_k = {} if plan is None else SegmentedTopK.of(plan, CPU)
    for place, keep in enumerate(keeps):
        expected, first = [], 0
        for request in requests:
            mine = scores[first : first + request[1]]
            rows = by_loops(request, mine, place, keep, window, tail)
            expected.append([first + row for row in rows])
            first += request[1]
        quota = None if plan is None else plan.quotas[place]
        assert rows_of(quota, top_k, torch.tensor(scores)) == [
            row for rows in expected for row in rows
        ]
        if quota is not None:
            assert quota.selected_per_request.tolist() == [len(rows) for rows in expected]
            assert quota.num_selected == sum(map(len, expected))


def test_a_batch_of_one_ratio_is_planned_as_if_its_layers_were_all() -> None:
    requests = [(0, 50, 50, 2), (10, 1, 5, 2), (30, 40, 90, 2)]
    some = make_plan(batch_of(requests), [0.0, THIRD, 0.25], 16, 8)
    whole = make_plan(batch_of(requests), [0.0, THIRD], 16, 8)
    assert some is not None
    assert whole is not None
    assert some.quotas[2] is None
    assert len(some.different_quotas) == len(whole.different_quotas) == 2
    for quota, other in zip(some.different_quotas, whole.different_quotas, strict=True):
        assert quota.top_k_slots.tolist() == other.top_k_slots.tolist()
    assert some.forced_rows.tolist() == whole.forced_rows.tolist()


def test_layers_that_choose_alike_share_a_quota() -> None:
    """Three requests, of one, two and four layers."""
    requests = [(0, 50, 50, 1), (0, 50, 50, 2), (0, 50, 50, 4)]
    plan = make_plan(batch_of(requests), [0.0, 0.0, THIRD, THIRD, THIRD], 16, 8)
    assert plan is not None
    assert len(plan.different_quotas) == 3
    assert plan.quotas[2] is plan.quotas[3]
    assert plan.quotas[4] is None
    assert plan.scored == [plan.quotas[2]]


def test_a_request_that_skips_nothing_neither_competes_nor_needs_a_sink() -> None:
    plan = make_plan(batch_of([(5, 30, 50, 0), (5, 30, 50, 1)]), [THIRD], 16, 8)
    assert plan is not None
    assert plan.requests.tolist() == [1]
    assert plan.candidates.tolist() == list(range(30, 60))
    assert make_plan(batch_of([(5, 30, 50, 0)]), [THIRD], 16, 8) is None


def test_of_it_only_sampled_rows_are_read_in_the_last_layer() -> None:
    """As in stock vLLM nobody reads the others."""
    plan = make_plan(batch_of([(5, 30, 50, 0), (5, 30, 50, 1)]), [THIRD], 16, 8)
    assert plan is not None
    assert plan.sampled_rows is not None
    assert plan.sampled_rows.tolist() == [29, 59]


@pytest.mark.parametrize("layers", [1, 40])
def test_a_plan_for_many_ratios_is_made_in_a_few_vector_operations(layers: int) -> None:
    import cProfile
    import pstats

    requests = [(0, 500, 500, count) for count in range(layers + 1)]
    profile = cProfile.Profile()
    profile.runcall(make_plan, batch_of(requests), [0.0] * layers, 128, 64)
    calls = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
    assert calls < 400 + 60 * layers
