"""Which queries and which keys each program of the attention kernel takes."""

import numpy as np
import pytest
import torch

from orthorank_vllm.attention import tiles as module
from orthorank_vllm.attention.tiles import MOST_PARTIALS, SPLIT_KEYS, SPLIT_QUERIES, Tiles

CPU = torch.device("cpu")


def make_tiles(rows: list[int], context: list[int], query_len: list[int], tile: int = 32) -> Tiles:
    arrays = (np.array(rows), np.array(context), np.array(query_len))
    return module.make_tiles(*arrays, tile=tile, device=CPU)


def test_tiles_cover_every_row_once_and_the_longest_come_first() -> None:
    rows = [70, 0, 1, 32, 33]
    tiles = make_tiles(rows, [0, 5, 1900, 100, 0], [200, 9, 1, 90, 99])
    programs = tiles.programs.numpy()
    covered = np.concatenate([first + np.arange(count) for _, first, count, *_ in programs])
    assert sorted(covered) == list(range(sum(rows)))
    owner = np.repeat(np.arange(5), rows)
    for request, first, count, part, parts, _ in programs:
        assert (owner[first : first + count] == request).all()
        assert (part, parts) == (0, 1)
    assert programs[0, :3].tolist() == [2, 70, 1]
    # The third tile of the first request has its last rows, which see about 200 keys.
    assert programs[1, :3].tolist() == [0, 64, 6]
    assert not len(tiles.merges)
    assert tiles.num_partials == 0


def test_the_keys_of_a_request_that_decodes_beside_a_prompt_are_shared() -> None:
    """No program walks through more of them than `SPLIT_KEYS`.

    Break seen: one program for all of a decoding request's context.
    """
    contexts = [5 * SPLIT_KEYS + 7, 0, SPLIT_KEYS - 1, 3 * SPLIT_KEYS]
    tiles = make_tiles([1, 40, 1, 4], contexts, [1, 120, 1, 4])
    parts = [programs_of(tiles, request) for request in range(4)]
    assert [len(found) for found in parts] == [6, 2, 1, 4]
    for request in (0, 3):
        assert parts[request][:, 3].tolist() == list(range(len(parts[request])))
    assert tiles.num_partials == 6 * 1 + 4 * 4
    assert tiles.merges[:, 0].tolist() == [0, 42, 43, 44, 45]


def programs_of(tiles: Tiles, request: int) -> torch.Tensor:
    """In the order of their parts."""
    found = tiles.programs[tiles.programs[:, 0] == request]
    return found[found[:, 3].argsort(stable=True)]


def test_each_part_of_each_row_has_a_place_of_its_own_and_is_merged() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        requests = int(random.integers(1, 9))
        rows = random.integers(1, SPLIT_QUERIES + 3, requests)
        context = random.integers(0, 9 * SPLIT_KEYS, requests)
        tiles = make_tiles(rows.tolist(), context.tolist(), rows.tolist(), tile=SPLIT_QUERIES + 1)
        written = {
            (first + row, partial + row)
            for _, first, count, _, parts, partial in tiles.programs.tolist()
            if parts > 1
            for row in range(count)
        }
        read = {
            (row, first + part * step)
            for row, first, step, parts in tiles.merges.tolist()
            for part in range(parts)
        }
        assert written == read
        assert sorted(place for _, place in read) == list(range(tiles.num_partials))


@pytest.mark.parametrize("requests", [1, 100, 1000])
def test_what_is_to_be_merged_has_a_bound(requests: int) -> None:
    """The profile run counts that much."""
    ones = [1] * requests
    tiles = make_tiles(ones, [100 * SPLIT_KEYS] * requests, ones)
    assert 0 < tiles.num_partials <= MOST_PARTIALS
    assert len(tiles.programs) >= min(MOST_PARTIALS // 2, 100 * requests)


def test_the_queries_of_a_prompt_share_nothing() -> None:
    """There are programs enough without."""
    tiles = make_tiles([64 * 32], [50_000], [6000])
    assert tiles.programs[:, 4].tolist() == [1] * 64
