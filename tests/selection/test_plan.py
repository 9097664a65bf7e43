"""The plan against the rule written out with loops."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orthorank_vllm.selection.plan import Batch, Plan, make_plan, profile_run_batch


def batch(*requests: tuple[int, int, int]) -> Batch:
    """(tokens computed, tokens in this forward, prompt length) of each request."""
    computed, query_len, prompt_len = np.array(requests, dtype=np.int64).T
    return Batch(computed, query_len, prompt_len, first_token=np.arange(len(requests)) + 100)


def plan_of(*requests: tuple[int, int, int], keep: float = 1 / 3, window: int = 128) -> Plan:
    plan = make_plan(batch(*requests), keep, window)
    assert plan is not None
    return plan


def top_k_per_segment(plan: Plan) -> list[int]:
    return np.bincount(plan.segment[plan.top_k_slots], minlength=plan.segment.max() + 1).tolist()


def test_a_batch_of_decodes_has_no_plan() -> None:
    assert make_plan(batch((10, 1, 10), (57, 1, 30), (5, 4, 5)), 1 / 3, 128) is None


def test_a_one_token_prompt_has_no_plan() -> None:
    assert make_plan(batch((0, 1, 1)), 1 / 3, 128) is None


def test_a_last_chunk_of_one_token_has_no_plan() -> None:
    assert make_plan(batch((40, 1, 41)), 1 / 3, 128) is None


def test_a_first_chunk_of_one_token_selects_nothing() -> None:
    """Break seen: the only token of the segment top_k, and it is position 0."""
    plan = plan_of((0, 1, 50))
    assert plan.num_selected == 0
    assert plan.candidates.tolist() == [0]


def test_the_share_of_each_window_part_is_rounded_up() -> None:
    """Break seen: rounded to nearest."""
    plan = plan_of((0, 302, 302))
    assert top_k_per_segment(plan) == [43, 43, 16]
    assert plan.forced_rows.tolist() == [301]


def test_a_share_that_is_whole_is_not_rounded_up_by_float_noise() -> None:
    """Break seen: without the small term 0.07 x 100 becomes 8."""
    assert top_k_per_segment(plan_of((5, 100, 500), keep=0.07, window=0)) == [7]


def test_windows_are_of_absolute_positions() -> None:
    """Break seen: windows counted from the chunk's first token."""
    plan = plan_of((100, 60, 400))
    assert np.bincount(plan.segment).tolist() == [28, 32]


def test_a_window_of_zero_is_the_whole_prompt() -> None:
    plan = plan_of((0, 1000, 1000), window=0)
    assert set(plan.segment.tolist()) == {0}


def test_windows_of_different_requests_never_mix() -> None:
    plan = plan_of((0, 10, 10), (0, 20, 20))
    assert np.bincount(plan.segment).tolist() == [10, 20]
    assert plan.request.tolist() == [0] * 10 + [1] * 20


def test_generated_tokens_are_always_selected_when_recomputed() -> None:
    plan = plan_of((0, 25, 20))
    assert plan.forced_rows.tolist() == [19, 20, 21, 22, 23, 24]
    assert plan.candidates.tolist() == list(range(20))


def test_decode_rows_between_prefills_are_always_selected() -> None:
    plan = plan_of((0, 9, 9), (30, 1, 12), (4, 6, 40))
    assert plan.forced_rows.tolist() == [8, 9]
    assert plan.requests.tolist() == [0, 2]
    assert plan.selected_per_request.tolist() == [4, 1, 2]


def test_the_sink_is_in_the_batch_only_with_position_0() -> None:
    plan = plan_of((0, 9, 9), (4, 6, 40), (0, 5, 80))
    assert plan.sink_row.tolist() == [0, -1, 15]
    assert plan.first_token.tolist() == [100, 101, 102]
    assert plan.at_position_0.tolist() == [0, 15]


def test_only_sampled_rows_are_read() -> None:
    """A chunk's end, a prompt's end, a decode, and one with three guesses to verify."""
    plan = plan_of((0, 20, 40), (10, 30, 40), (50, 1, 40), (40, 4, 40))
    assert plan.sampled_rows is not None
    assert plan.sampled_rows.tolist() == [19, 49, 50, 51, 52, 53, 54]
    assert plan.sampled_per_request.tolist() == [1, 1, 1, 4]


@pytest.mark.parametrize("guesses", [1, 3])
@pytest.mark.parametrize("computed", [0, 40])
def test_a_prompts_last_row_is_read_before_guesses_too(computed: int, guesses: int) -> None:
    """One token is left, and what was guessed after it is to be verified; then another prompt.

    Break seen: each request's last row, and those past its prompt.
    """
    plan = plan_of((computed, 1 + guesses, computed + 1), (0, 20, 20))
    assert plan.sampled_rows is not None
    assert plan.sampled_rows.tolist() == [*range(1 + guesses), guesses + 20]
    assert plan.sampled_per_request.tolist() == [1 + guesses, 1]


def test_all_rows_are_read_where_prompt_log_probabilities_are_wanted() -> None:
    plan = make_plan(replace(batch((0, 20, 40)), wants_all_rows=True), 1 / 3, 128)
    assert plan is not None
    assert plan.sampled_rows is None


requests = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=4
)


@given(
    requests,
    st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.9]),
    st.sampled_from([0, 1, 4, 7, 16]),
)
def test_every_token_either_competes_or_is_selected(
    given_requests: list[tuple[int, int, int]], keep: float, window: int
) -> None:
    plan = make_plan(batch(*given_requests), keep, window)
    wanted = expected_shares(given_requests, keep, window)
    if plan is None:
        assert all(share is None for share in wanted.values())
        return
    rows = sum(length for _, length, _ in given_requests)
    assert set(plan.candidates) | set(plan.forced_rows) == set(range(rows))
    shares = {
        int(plan.candidates[plan.segment == segment].min()): top_k
        for segment, top_k in enumerate(top_k_per_segment(plan))
    }
    assert shares == {row: share for row, share in wanted.items() if share is not None}
    assert plan.selected_per_request.sum() == plan.num_selected


def expected_shares(
    given_requests: list[tuple[int, int, int]], keep: float, window: int
) -> dict[int, Any]:
    """First row of each window segment to how many of it win; None if all are selected."""
    shares: dict[int, Any] = {}
    row = 0
    for computed, length, prompt_len in given_requests:
        segments: dict[int, list[int]] = {}
        for position in range(computed, min(computed + length, prompt_len)):
            segments.setdefault(position // window if window else 0, []).append(position)
        for segment in segments.values():
            share = math.ceil(keep * len(segment) - 1e-9)
            if 0 in segment and prompt_len > 1:
                share = min(share, len(segment) - 1)
            shares[row + segment[0] - computed] = share if share < len(segment) else None
        row += length
    return shares


@pytest.mark.parametrize("tokens", [128, 8192])
def test_a_plan_is_made_in_a_few_vector_operations(tokens: int) -> None:
    """A loop over tokens would show as time; counted here as Python function calls."""
    import cProfile
    import pstats

    profile = cProfile.Profile()
    profile.runcall(make_plan, batch((0, tokens, tokens)), 1 / 3, 128)
    assert pstats.Stats(profile).total_calls < 400  # type: ignore[attr-defined]


@pytest.mark.parametrize(("tokens", "most"), [(8192, 256), (8193, 256), (16, 256), (1, 4), (3, 4)])
def test_the_rehearsed_plan_selects_no_less_than_that_of_one_prompt_as_long(
    tokens: int, most: int
) -> None:
    rehearsed = profile_run_batch(tokens, most)
    assert rehearsed.query_len.sum() == tokens
    assert len(rehearsed.query_len) <= most
    assert rehearsed.wants_all_rows
    plan = make_plan(rehearsed, 1 / 3, 128)
    one = make_plan(batch((0, tokens, tokens)), 1 / 3, 128)
    assert (plan is None) == (one is None) == (tokens == 1)
    if plan is not None and one is not None:
        assert plan.num_selected >= one.num_selected
