"""The programs of one launch of the attention kernel: which queries each takes, and which keys.

Where few queries see many keys, as one that decodes beside a prompt does, a program would walk
through them alone, long after all others have ended. There several share the walk, and what each
of them found is merged (`paged_merge`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from orthorank_vllm.selection.plan import Ints
from orthorank_vllm.selection.topk import to_device

# Query rows of one program: queries x the query heads that share a KV head. One configuration
# for all lengths, not measured on any GPU: tuning at run time would compile in mid-service.
TILE_ROWS = 128
# Of so few queries, more keys than these are shared among programs. NOT MEASURED, on any GPU.
SPLIT_QUERIES = 16
SPLIT_KEYS = 2048
# Rows of what is to be merged, so that its memory has a bound: 34 MB with 32 heads of 128. Beyond,
# there are programs enough, and each takes more keys.
MOST_PARTIALS = 2048


@dataclass(frozen=True)
class Tiles:
    """One launch's programs and what is merged after it, on the device, all int64.

    Attributes:
        programs: [P, 6] of each its request, its first row among the queries, its number of rows,
            all of one request; which part of their keys it takes, of how many; and where among
            the partial results its rows begin, if those are several.
        merges: [M, 4] of each row in parts itself, its first partial result, how many there are
            from one part to the next, and how many parts.
        num_partials: rows of partial results.
    """

    programs: torch.Tensor
    merges: torch.Tensor
    num_partials: int


def queries_per_tile(group_size: int) -> int:
    """How many queries one program takes, all heads of a KV head together.

    Args:
        group_size: query heads that share a KV head.
    """
    return max(TILE_ROWS // group_size, 1)


def make_tiles(
    rows_per_request: Ints, context: Ints, query_len: Ints, tile: int, device: torch.device
) -> Tiles:
    """The programs of one launch, those with most keys first so that none of them runs last, alone.

    Args:
        rows_per_request: [requests] how many queries each has.
        context: [requests] keys before this forward's.
        query_len: [requests] tokens of this forward, among which the queries are spread.
        tile: queries of one program, at most.
    """
    tiles = -(-rows_per_request // tile)
    request = np.repeat(np.arange(len(tiles)), tiles)
    first = _counted(tiles) * tile
    count = np.minimum(rows_per_request[request] - first, tile)
    # Where a tile's last query will be is known on the device alone; this is near enough.
    share = (first + count) / np.maximum(rows_per_request[request], 1)
    keys = context[request] + query_len[request] * share
    first_row = (np.cumsum(rows_per_request) - rows_per_request)[request] + first

    parts = _parts(count, keys)
    partials = np.where(parts > 1, parts * count, 0)
    first_partial = np.cumsum(partials) - partials
    of_tile, part = np.repeat(np.arange(len(parts)), parts), _counted(parts)
    programs = np.stack(
        [
            *(column[of_tile] for column in (request, first_row, count)),
            *(part, parts[of_tile], first_partial[of_tile] + part * count[of_tile]),
        ],
        axis=1,
    )
    order = np.argsort(-(keys / parts)[of_tile], kind="stable")

    rows = np.where(parts > 1, count, 0)
    of_row, row = np.repeat(np.arange(len(rows)), rows), _counted(rows)
    merges = np.stack(
        [first_row[of_row] + row, first_partial[of_row] + row, count[of_row], parts[of_row]],
        axis=1,
    )
    arrays = [array.astype(np.int64).ravel() for array in (programs[order], merges)]
    on_device = to_device(arrays, device)
    return Tiles(on_device[0].view(-1, 6), on_device[1].view(-1, 4), int(partials.sum()))


def rehearsed_tiles(device: torch.device) -> Iterator[Tiles]:
    """Launches for one query of one key: taken by one program, and shared by two."""
    for parts in (1, 2):
        programs = [[0, 0, 1, part, parts, part] for part in range(parts)]
        merges = [[0, 0, 1, parts]] if parts > 1 else []
        yield Tiles(
            torch.tensor(programs, device=device),
            torch.tensor(merges, dtype=torch.int64, device=device).view(-1, 4),
            parts if parts > 1 else 0,
        )


def _parts(count: Ints, keys: np.ndarray) -> Ints:
    """Programs that share each tile's keys."""
    most_keys = SPLIT_KEYS
    while True:
        parts = np.where(count <= SPLIT_QUERIES, np.ceil(keys / most_keys), 1).astype(np.int64)
        parts = np.maximum(parts, 1)
        if (parts * count)[parts > 1].sum() <= MOST_PARTIALS:
            return parts
        most_keys *= 2


def _counted(sizes: Ints) -> Ints:
    """`0, 1, …`, as many as each size, one after the other."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
