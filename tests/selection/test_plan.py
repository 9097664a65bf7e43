"""The plan against the rule written out with loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthorank_vllm.selection.plan import Batch, Plan, make_plan, profile_run_batches
from orthorank_vllm.selection.quotas import Quota

THIRD = 1 / 3


def batch(*requests: tuple[int, int, int]) -> Batch:
    """(tokens computed, tokens in this forward, prompt length) of each request."""
    computed, query_len, prompt_len = np.array(requests, dtype=np.int64).T
    return Batch(computed, query_len, prompt_len, first_token=np.arange(len(requests)) + 100)


def plan_of(
    *requests: tuple[int, int, int], keep: float = THIRD, window: int = 128, tail: int = 1
) -> Plan:
    plan = make_plan(batch(*requests), [keep], window, tail)
    assert plan is not None
    return plan


def sizes(plan: Plan) -> list[int]:
    """How many compete in each segment."""
    return np.bincount(plan.segment).tolist()


def only_quota(plan: Plan) -> Quota:
    [quota] = plan.different_quotas
    return quota


def chosen(plan: Plan, quota: Quota | None = None) -> list[int]:
    """How many are chosen of each segment."""
    quota = quota or only_quota(plan)
    slots = quota.top_k_slots
    counts = np.bincount(plan.segment[slots], minlength=plan.segment.max() + 1).tolist()
    assert counts == quota.top_k.tolist()
    return counts


def test_a_sink_is_known_by_its_embedding_where_it_has_no_token() -> None:
    """Break seen: by the token id that the embedding's place is filled with."""
    rows = torch.randn(3, 8, dtype=torch.bfloat16)
    embedded = replace(
        batch(*[(0, 100, 100)] * 5),
        first_token=np.array([7, 0, 0, 0, 0]),
        first_embedding={1: rows[0], 2: rows[0].clone(), 3: rows[1]},
    )
    token, first, again, other, zero = embedded.sinks
    assert first == again
    assert len({token, first, other, zero}) == 4
    with_adapters = replace(embedded, adapter=np.array([0, 1, 2, 0, 0]))
    assert with_adapters.sinks[1] != with_adapters.sinks[2] != again


def test_a_batch_of_decodes_has_no_plan() -> None:
    assert make_plan(batch((10, 1, 10), (57, 1, 30), (5, 4, 5)), [THIRD, 0.0], 128, 1) is None


def test_without_a_keep_there_is_no_plan() -> None:
    assert make_plan(batch((0, 300, 300)), [], 128, 1) is None


@pytest.mark.parametrize("tail", [1, 16, 64])
def test_a_prompt_not_longer_than_the_first_token_and_the_tail_has_no_plan(tail: int) -> None:
    for length in {1, 2, tail, tail + 1}:
        assert make_plan(batch((0, length, length)), [0.0], 128, tail) is None
    assert make_plan(batch((0, tail + 2, tail + 2)), [0.0], 128, tail) is not None


def test_a_last_chunk_within_the_tail_has_no_plan() -> None:
    """Guards against: the tail taken of the chunk."""
    assert make_plan(batch((40, 16, 56)), [0.0], 128, 16) is None
    assert plan_of((39, 17, 56), keep=0.0, tail=16).candidates.tolist() == [0]


def test_a_chunk_that_ends_within_the_tail_competes_up_to_it() -> None:
    plan = plan_of((40, 20, 70), keep=0.0, tail=16)
    assert plan.candidates.tolist() == list(range(14))
    assert plan.forced_rows.tolist() == list(range(14, 20))


def test_a_chunk_before_the_tail_has_nothing_that_is_computed_in_any_case() -> None:
    plan = plan_of((40, 20, 300), keep=0.0, tail=64)
    assert only_quota(plan).num_selected == 0
    assert only_quota(plan).selected_per_request.tolist() == [0]


def test_a_first_chunk_of_one_token_has_no_plan() -> None:
    """Guards against: position 0 competes."""
    assert make_plan(batch((0, 1, 50)), [THIRD, 0.0], 128, 1) is None


def test_windows_so_small_that_everything_is_chosen_have_no_plan() -> None:
    assert make_plan(batch((0, 90, 90)), [THIRD], 1, 1) is None
    assert make_plan(batch((0, 90, 90)), [THIRD, 0.0], 1, 1) is not None


def test_position_0_and_the_tail_are_always_computed_and_do_not_count() -> None:
    """Guards against: position 0 counts in its window; the tail in its."""
    plan = plan_of((0, 302, 302), tail=10)
    assert sizes(plan) == [127, 128, 36]
    assert chosen(plan) == [43, 43, 12]
    assert plan.forced_rows.tolist() == [0, *range(292, 302)]


def test_the_share_of_each_window_part_is_rounded_up() -> None:
    """Break seen: rounded to nearest."""
    assert chosen(plan_of((0, 302, 302), keep=0.3)) == [39, 39, 14]


def test_a_share_that_is_whole_is_not_rounded_up_by_float_noise() -> None:
    """Break seen: without the small term 0.07 x 100 becomes 8."""
    assert chosen(plan_of((5, 100, 500), keep=0.07, window=0)) == [7]


def test_every_keep_has_a_quota_of_its_own() -> None:
    plan = make_plan(batch((0, 201, 201), (50, 1, 50)), [0.25, 0.0, 0.5, 0.25], 0, 64)
    assert plan is not None
    quarter, nothing, half = plan.different_quotas
    assert plan.quotas == [quarter, nothing, half, quarter]
    assert plan.scored == [quarter, half]
    forced = 1 + 64 + 1
    assert [quota.num_selected for quota in plan.different_quotas] == [
        34 + forced,
        forced,
        68 + forced,
    ]
    assert quarter.selected_per_request.tolist() == [34 + 65, 1]
    assert nothing.rows is not None
    assert nothing.rows.tolist() == plan.forced_rows.tolist()


def test_windows_are_of_absolute_positions() -> None:
    """Break seen: windows counted from the chunk's first token."""
    assert sizes(plan_of((100, 60, 400))) == [28, 32]


def test_a_window_of_zero_is_the_whole_prompt() -> None:
    assert sizes(plan_of((0, 1000, 1000), window=0)) == [998]


def test_windows_of_different_requests_never_mix() -> None:
    plan = plan_of((0, 10, 10), (0, 20, 20))
    assert sizes(plan) == [8, 18]
    assert plan.request.tolist() == [0] * 8 + [1] * 18


def test_generated_tokens_are_always_selected_when_recomputed() -> None:
    plan = plan_of((0, 25, 20), tail=3)
    assert plan.forced_rows.tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert plan.candidates.tolist() == list(range(1, 17))


def test_decode_rows_between_prefills_are_always_selected() -> None:
    plan = plan_of((0, 9, 9), (30, 1, 12), (4, 6, 40))
    assert plan.forced_rows.tolist() == [0, 8, 9]
    assert plan.requests.tolist() == [0, 2]
    assert only_quota(plan).selected_per_request.tolist() == [5, 1, 2]


def test_only_requests_with_candidates_need_a_sink_and_it_is_in_the_batch_with_position_0() -> None:
    plan = plan_of((0, 9, 9), (0, 3, 3), (4, 6, 40), (0, 5, 80), tail=3)
    assert plan.requests.tolist() == [0, 2, 3]
    assert plan.sink_row.tolist() == [0, -1, 18]
    assert plan.batch.first_token[plan.requests].tolist() == [100, 102, 103]


def test_only_sampled_rows_are_read() -> None:
    """A chunk's end, a prompt's end, a decode, and one with three guesses to verify."""
    plan = plan_of((0, 20, 40), (10, 30, 40), (50, 1, 40), (40, 4, 40), tail=8)
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
    plan = make_plan(replace(batch((0, 20, 40)), wants_all_rows=True), [THIRD], 128, 1)
    assert plan is not None
    assert plan.sampled_rows is None


requests = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=4
)


@given(
    requests,
    st.lists(st.sampled_from([0.0, 0.1, 0.25, THIRD, 0.5, 0.9]), min_size=1, max_size=3),
    st.sampled_from([0, 1, 4, 7, 16]),
    st.sampled_from([1, 2, 9, 40]),
)
def test_every_token_either_competes_or_is_selected(
    given_requests: list[tuple[int, int, int]], keeps: list[float], window: int, tail: int
) -> None:
    plan = make_plan(batch(*given_requests), keeps, window, tail)
    segments, forced = by_loops(given_requests, window, tail)
    shares = {
        keep: {rows[0]: math.ceil(keep * len(rows) - 1e-9) for rows in segments} for keep in keeps
    }
    everything = {rows[0]: len(rows) for rows in segments}
    if plan is None:
        assert all(share == everything for share in shares.values())
        return
    assert plan.candidates.tolist() == [row for rows in segments for row in rows]
    assert plan.forced_rows.tolist() == forced
    firsts = [int(plan.candidates[plan.segment == s].min()) for s in range(len(segments))]
    for keep, quota in zip(keeps, plan.quotas, strict=True):
        assert quota is not None
        assert dict(zip(firsts, chosen(plan, quota), strict=True)) == shares[keep]
        assert quota.num_selected == sum(shares[keep].values()) + len(forced)


def by_loops(
    given_requests: list[tuple[int, int, int]], window: int, tail: int
) -> tuple[list[list[int]], list[int]]:
    """Rows of each window's part, and those that are computed in any case."""
    segments: list[list[int]] = []
    forced: list[int] = []
    row = 0
    for computed, length, prompt_len in given_requests:
        parts: dict[int, list[int]] = {}
        for position in range(computed, computed + length):
            if position == 0 or position >= prompt_len - tail:
                forced.append(row)
            else:
                parts.setdefault(position // window if window else 0, []).append(row)
            row += 1
        segments += parts.values()
    return segments, forced


@pytest.mark.parametrize("tokens", [128, 8192])
def test_a_plan_is_made_in_a_few_vector_operations(tokens: int) -> None:
    """A loop over tokens would show as time; counted here as Python function calls."""
    import cProfile
    import pstats

    profile = cProfile.Profile()
    profile.runcall(make_plan, batch((0, tokens, tokens)), [0.25, 0.0, 0.5], 128, 64)
    assert pstats.Stats(profile).total_calls < 400  # type: ignore[attr-defined]


@pytest.mark.parametrize("keeps", [[0.0], [THIRD, 0.0], [0.9]])
@pytest.mark.parametrize("tail", [1, 64])
@pytest.mark.parametrize(("tokens", "most"), [(8192, 256), (8193, 256), (16, 256), (1, 4), (3, 4)])
def test_the_rehearsed_plan_selects_no_less_than_that_of_one_prompt_as_long(
    tokens: int, most: int, tail: int, keeps: list[float]
) -> None:
    """Guards against: prompts so short that all of them are tail, and so no plan at all."""
    rehearsed, again = profile_run_batches(tokens, most, keeps, tail)
    assert again.query_len.sum() == tokens
    assert (make_plan(again, keeps, 128, tail) is None) <= (tokens <= 11 + tail)
    assert rehearsed.query_len.sum() == tokens
    assert len(rehearsed.query_len) <= most
    assert rehearsed.wants_all_rows
    plan = make_plan(rehearsed, keeps, 128, tail)
    one = make_plan(batch((0, tokens, tokens)), keeps, 128, tail)
    assert (plan is not None) == (tokens > (3 if 0.9 in keeps else 1))
    if plan is None or one is None or rehearsed.prompt_len[0] > rehearsed.query_len[0]:
        return
    for quota, of_one in zip(plan.quotas, one.quotas, strict=True):
        assert quota is not None
        assert of_one is not None
        assert quota.num_selected >= of_one.num_selected
