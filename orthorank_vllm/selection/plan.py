"""Which rows of a batch compete in a selective layer.

Made on the host from exact numbers, before the forward: the counts, and so
every tensor shape of the sparse forward, are known without asking the device.
The rule is numbered as in README.md, "The selection rule".
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One forward's requests, in batch order. All arrays are [requests].

    Attributes:
        num_computed: tokens whose K and V are in the cache already.
        query_len: tokens that this forward computes.
        prompt_len: length of the prompt.
        first_token: token id at position 0.
        is_read_whole: whether more than the sampled rows' output is read (prompt
            log-probabilities).
    """

    num_computed: Ints
    query_len: Ints
    prompt_len: Ints
    first_token: Ints
    is_read_whole: bool = False

    @cached_property
    def prompt_tokens(self) -> Ints:
        """How many of each request's computed tokens belong to its prompt (rule 5)."""
        return np.minimum(np.maximum(self.prompt_len - self.num_computed, 0), self.query_len)


@dataclass(frozen=True)
class Plan:
    """The competition of one forward. Rows index the batch's tokens.

    A *window part* is the part of one request's window that this forward
    computes. Only parts that leave some token out are here; the tokens of the
    others are among `always`.

    Attributes:
        candidates: [C] rows that compete, ascending.
        part: [C] window part of each candidate, ascending from 0.
        request: [C] index of each candidate's request among `requests`.
        at_position_0: indices into `candidates` of sink tokens, which never win.
        winners: [K] for candidates sorted by (part, score): which to take.
        always: [A] rows selected whatever their score, ascending.
        requests: [R] batch indices of the requests that have candidates.
        first_token: [R] their token ids at position 0.
        sink_row: [R] row of their position 0, or -1 where this forward lacks it.
        selected_per_request: [batch] selected rows of each request; a prompt's
            last token that also wins is counted twice (see `selection.select`).
        read: [N] rows whose output is read, ascending: each request's last, its
            prompt's last, and all past its prompt. None if all are.
        read_per_request: [batch] how many those are.
        num_tokens: rows in the batch.
        window: positions per window, 0 for the whole prompt.
        batch: what the plan was made of.
    """

    candidates: Ints
    part: Ints
    request: Ints
    at_position_0: Ints
    winners: Ints
    always: Ints
    requests: Ints
    first_token: Ints
    sink_row: Ints
    selected_per_request: Ints
    read: Ints | None
    read_per_request: Ints
    num_tokens: int
    window: int
    batch: Batch

    @property
    def num_selected(self) -> int:
        """Rows that a selective layer updates, duplicates included."""
        return len(self.winners) + len(self.always)


def make_plan(batch: Batch, keep: float, window: int) -> Plan | None:
    """Apply rules 3 to 5 to one forward.

    Args:
        keep: fraction of a window part that is selected, in (0, 1).
        window: positions per window; 0 is one window for the whole prompt.

    Returns:
        None if every token is selected, so that the dense forward is the same.
    """
    if not batch.prompt_tokens.any():
        return None
    num_tokens = int(batch.query_len.sum())
    request_of_row = np.repeat(np.arange(len(batch.query_len)), batch.query_len)
    first_row = np.cumsum(batch.query_len) - batch.query_len
    rows = np.arange(num_tokens)
    position = rows - first_row[request_of_row] + batch.num_computed[request_of_row]
    is_prompt = position < batch.prompt_len[request_of_row]

    prompt_rows = rows[is_prompt]
    request = request_of_row[prompt_rows]
    position = position[prompt_rows]
    window_index = position // window if window else np.zeros_like(position)
    is_start = _starts(request) | _starts(window_index)
    start = np.flatnonzero(is_start)
    part = np.cumsum(is_start) - 1

    size = np.diff(start, append=len(prompt_rows))
    wins = np.ceil(keep * size - 1e-9).astype(np.int64)
    has_sink = (position[start] == 0) & (batch.prompt_len[request[start]] > 1)
    wins = np.where(has_sink, np.minimum(wins, size - 1), wins)

    competes = (wins < size)[part]
    if not competes.any():
        return None
    is_last = position == batch.prompt_len[request] - 1
    is_always = ~is_prompt
    is_always[prompt_rows[~competes | is_last]] = True
    always = np.flatnonzero(is_always)

    contested = wins < size
    wins, size = wins[contested], size[contested]
    candidates = prompt_rows[competes]
    part = np.repeat(np.arange(len(size)), size)
    part_start = np.cumsum(size) - size
    winner_part = np.repeat(np.arange(len(size)), wins)
    winners = np.arange(wins.sum()) + (part_start - np.cumsum(wins) + wins)[winner_part]

    # vLLM reads a request's last row and, before that, each row that a guess follows (speculation).
    # The first of these can be the prompt's last: a request with a single token left is given
    # placeholders for guesses at once (vllm/v1/core/sched/scheduler.py, `pad_spec_decode`).
    is_read = ~is_prompt
    is_read[prompt_rows[is_last]] = True
    is_read[np.cumsum(batch.query_len) - 1] = True

    request_of_candidate = request[competes]
    is_first = _starts(request_of_candidate)
    requests = request_of_candidate[is_first]
    winners_per_request = np.bincount(
        request_of_row[candidates[part_start]], weights=wins, minlength=len(batch.query_len)
    ).astype(np.int64)
    always_per_request = np.bincount(request_of_row[always], minlength=len(batch.query_len))
    return Plan(
        candidates=candidates,
        part=part,
        request=np.cumsum(is_first) - 1,
        at_position_0=np.flatnonzero(position[competes] == 0),
        winners=winners,
        always=always,
        requests=requests,
        first_token=batch.first_token[requests],
        sink_row=np.where(batch.num_computed[requests] == 0, first_row[requests], -1),
        selected_per_request=winners_per_request + always_per_request,
        read=None if batch.is_read_whole else rows[is_read],
        read_per_request=np.bincount(request_of_row[is_read], minlength=len(batch.query_len)),
        num_tokens=num_tokens,
        window=window,
        batch=batch,
    )


def _starts(values: Ints) -> npt.NDArray[np.bool_]:
    """Where a run of equal values begins."""
    found = np.ones(len(values), dtype=bool)
    found[1:] = np.diff(values) != 0
    return found


def rehearsal_batch(num_tokens: int, most_requests: int) -> Batch:
    """The batch of so many tokens that needs most memory: as many prompts as there can be.

    Each of them rounds up what it selects, and is scored against a sink of its own.
    """
    requests = min(most_requests, max(num_tokens // 2, 1))
    length = np.full(requests, num_tokens // requests, dtype=np.int64)
    length[-1] += num_tokens % requests
    nothing = np.zeros_like(length)
    return Batch(nothing, length, length, first_token=nothing, is_read_whole=True)
