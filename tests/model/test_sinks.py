"""The table of sink states."""

import pytest
import torch

from orthorank_vllm.model.sinks import SinkTable


@pytest.fixture
def table() -> SinkTable:
    return SinkTable(2, 3, 4, torch.float32, torch.device("cpu"))


def test_a_token_keeps_its_slot(table: SinkTable) -> None:
    slots, missing = table.reserve([7, 8])
    assert missing == [7, 8]
    assert table.reserve([8, 7]) == (slots[::-1], [])


def test_a_token_that_stands_twice_has_one_slot(table: SinkTable) -> None:
    slots, missing = table.reserve([7, 7, 8])
    assert missing == [7, 8]
    assert slots[0] == slots[1] != slots[2]


def test_the_token_not_used_for_longest_gives_way(table: SinkTable) -> None:
    """Break seen: first in, first out."""
    table.reserve([1, 2, 3])
    table.reserve([1])
    _, missing = table.reserve([4])
    assert missing == [4]
    assert table.reserve([1, 3, 4])[1] == []


def test_tokens_of_one_forward_never_share_a_slot(table: SinkTable) -> None:
    """Break seen: a token that this forward needs evicted for another of its tokens."""
    table.reserve([1, 2, 3])
    slots, missing = table.reserve([5, 6, 1])
    assert missing == [5, 6]
    assert len(set(slots)) == 3


def test_everything_is_missing_after_the_weights_change(table: SinkTable) -> None:
    table.reserve([1, 2])
    table.clear()
    assert table.reserve([1, 2])[1] == [1, 2]


def test_the_table_may_be_written_to_wherever_it_was_made() -> None:
    """Break seen: made in a forward, and so a tensor for inference alone."""
    table = SinkTable(1, 2, 4, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        assert not table.rows.any()
    table.rows.fill_(1)
