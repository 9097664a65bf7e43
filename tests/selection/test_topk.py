"""Scores, top-k in windows, and what is selected whatever its score."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthorank_vllm.selection.plan import Batch, Plan, make_plan
from orthorank_vllm.selection.topk import (
    SegmentedTopK,
    pack,
    score,
    select_by_numpy,
    select_by_torch,
    to_device,
    unpack,
)


def select_rows(plan: Plan, scores: list[float], place: int = 0) -> list[int]:
    quota = plan.quotas[place]
    assert quota is not None
    top_k = SegmentedTopK.of(plan, torch.device("cpu"))[quota]
    competing = torch.tensor(scores)[top_k.candidates]
    rows, same = select_by_numpy(competing, top_k), select_by_torch(competing, top_k)
    assert rows.tolist() == same.tolist()
    assert len(rows) == quota.num_selected
    return rows.tolist()


def prompt_plan(
    length: int, *keeps: float, window: int, computed: int = 0, total: int = 0, tail: int = 1
) -> Plan:
    plan = make_plan(
        Batch(
            num_computed=np.array([computed]),
            query_len=np.array([length]),
            prompt_len=np.array([total or length]),
            first_token=np.array([1]),
        ),
        keeps,
        window,
        tail,
    )
    assert plan is not None
    return plan


def competition_of(request: list[int]) -> SegmentedTopK:
    """Every row a candidate, of the request given."""
    none = torch.empty(0, dtype=torch.int64)
    rows = torch.arange(len(request))
    return SegmentedTopK(
        candidates=rows,
        pair=rows * (max(request) + 1) + torch.tensor(request),
        rank=none,
        top_k_slots=none,
        forced_rows=none,
    )


def test_the_score_is_the_absolute_cosine_times_the_sinks_length() -> None:
    """Break seen: without the absolute value a token opposite to the sink wins."""
    residual = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    scores = score(residual, torch.tensor([[5.0, 0.0]]), competition_of([0, 0, 0, 0]))
    torch.testing.assert_close(scores, torch.tensor([5.0, 5.0, 0.0, 5 * 0.5**0.5]))


def test_every_token_is_scored_against_its_own_request() -> None:
    """Break seen: position 0 from the wrong request."""
    residual = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    sinks = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert score(residual, sinks, competition_of([0, 1, 1])).tolist() == [1.0, 0.0, 1.0]


def test_the_score_is_computed_in_float32_whatever_the_model_runs_in() -> None:
    residual = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    sinks = residual[:1]
    scores = score(residual, sinks, competition_of([0] * 50))
    assert scores.dtype == torch.float32
    wanted = torch.cosine_similarity(residual.double(), sinks.double()).abs().float()
    length = float(sinks.float().norm())
    torch.testing.assert_close(scores / length, wanted, atol=1e-6, rtol=0)


def test_the_lowest_scores_of_each_window_are_selected() -> None:
    """Break seen: the highest."""
    plan = prompt_plan(9, 0.5, window=4)
    rows = select_rows(plan, [1.0, 0.2, 0.9, 0.1, 0.5, 0.6, 0.7, 0.8, 0.3])
    assert rows == [0, 1, 3, 4, 5, 8]


def test_ties_go_to_the_lower_position() -> None:
    """Break seen: ties to the higher position."""
    plan = prompt_plan(100, 0.25, window=0, computed=7, total=300)
    assert select_rows(plan, [0.5] * 100) == list(range(25))


def test_position_0_and_the_tail_take_nobodys_place() -> None:
    """Guards against: the lowest score of all, position 0's, for one of two."""
    plan = prompt_plan(7, 0.5, window=0, tail=2)
    assert select_rows(plan, [0.0, 0.5, 0.4, 0.3, 0.9, 0.1, 0.1]) == [0, 2, 3, 5, 6]


def test_each_keep_selects_its_own_share_of_the_same_scores() -> None:
    plan = prompt_plan(9, 0.5, 0.0, 0.25, window=0)
    scores = [1.0, 0.7, 0.2, 0.6, 0.1, 0.5, 0.4, 0.3, 0.9]
    assert select_rows(plan, scores, 0) == [0, 2, 4, 6, 7, 8]
    assert select_rows(plan, scores, 2) == [0, 2, 4, 8]
    assert list(SegmentedTopK.of(plan, torch.device("cpu"))) == plan.scored


def test_the_largest_errors_of_each_window_are_selected_however_large() -> None:
    """Break seen: all above 103 alike, whose exponentials float32 does not hold."""
    plan = prompt_plan(9, 0.5, window=4)
    [top_k] = SegmentedTopK.of(plan, torch.device("cpu")).values()
    errors = torch.tensor([0.0, -3.0, 79.0, -79.0, 2.0, 1.0, 300.0, 0.5, 9.0])
    assert top_k.rows_by_error(errors).tolist() == [0, 1, 2, 4, 6, 8]


@pytest.mark.parametrize("scores", [[0.0, 1e-30, 1e-38, 1e-45, 0.5, 1.0, 1.0000001]])
def test_scores_are_ordered_down_to_the_smallest_float(scores: list[float]) -> None:
    plan = prompt_plan(len(scores), 0.4, window=0, computed=3, total=99)
    assert select_rows(plan, scores) == [0, 2, 3]


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
        ),
    ],
)
def test_every_array_arrives_whole_and_in_order(device: str) -> None:
    arrays = [np.arange(n, dtype=np.int64) * (n + 1) for n in (3, 0, 1, 40)]
    found = to_device(arrays, torch.device(device))
    assert [tensor.tolist() for tensor in found] == [array.tolist() for array in arrays]
    assert {tensor.dtype for tensor in found} == {torch.int64}


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_arrays_in_one_copy_are_whole_and_each_begins_at_sixteen_bytes(lengths: list[int]) -> None:
    arrays = [np.arange(n, dtype=np.int64) + 10 * i for i, n in enumerate(lengths)]
    found = unpack(torch.from_numpy(pack(arrays)), arrays)
    assert [tensor.tolist() for tensor in found] == [array.tolist() for array in arrays]
    assert all(tensor.storage_offset() % 2 == 0 for tensor in found)
