"""Where prompts may be cut, against the rule itself: what competes with what."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orthorank_vllm.selection.borders import Borders
from orthorank_vllm.selection.plan import Batch, make_plan

LENGTHS = st.integers(1, 60)
BORDERS = st.builds(Borders, window=st.integers(1, 20), tail=st.integers(1, 20))


def rivals(start: int, end: int, prompt_len: int, borders: Borders) -> set[frozenset[int]]:
    """The sets of positions that compete with each other in one forward's part of a prompt."""
    first, count, length = (np.array([number]) for number in (start, end - start, prompt_len))
    batch = Batch(first, count, length, first_token=first)
    plan = make_plan(batch, [0.0], borders.window, borders.tail)
    if plan is None:
        return set()
    positions = plan.candidates + start
    return {frozenset(positions[plan.segment == n].tolist()) for n in set(plan.segment.tolist())}


@given(st.data(), BORDERS, LENGTHS)
def test_however_a_prompt_is_cut_the_same_tokens_compete(
    data: st.DataObject, borders: Borders, prompt_len: int
) -> None:
    """Breaks seen: chunks that may end one token before the tail, and anywhere where there is no
    room for a window."""
    start, last, found = 0, prompt_len - borders.tail, set()
    while start < prompt_len:
        # Around the tail's beginning too.
        end = data.draw(
            st.integers(1, 80).map(start.__add__) | st.integers(-2, 2).map(last.__add__)
        )
        room = min(max(end - start, 1), prompt_len - start)
        chunk = borders.chunk(start, room, prompt_len)
        assert 0 <= chunk <= room
        found |= rivals(start, start + chunk, prompt_len, borders)
        start += chunk
    assert found == rivals(0, prompt_len, prompt_len, borders)


@given(BORDERS, LENGTHS, LENGTHS)
def test_what_two_prompts_share_competes_alike_in_both(
    borders: Borders, one_len: int, other_len: int
) -> None:
    """Break seen: whole blocks of a shorter prompt's last window."""
    shared = min(borders.shared(one_len), borders.shared(other_len))
    one, other = (
        {rival for rival in rivals(0, length, length, borders) if min(rival) < shared}
        for length in (one_len, other_len)
    )
    assert one == other
    assert all(max(rival) < shared for rival in one)


@given(st.integers(0, 200), BORDERS, LENGTHS)
def test_with_room_for_a_window_a_prompt_gets_on(
    start: int, borders: Borders, prompt_len: int
) -> None:
    left = prompt_len - start
    if left > 0:
        assert borders.chunk(start, min(borders.window, left), prompt_len) > 0
