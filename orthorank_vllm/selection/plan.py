"""Which rows of a batch a selective layer chooses from.

Made on the host from exact numbers, before the forward: the counts, and so
every tensor shape of the sparse forward, are known without asking the device.
The rule is numbered as in README.md, "The selection rule".
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """One forward's requests, in batch order. All arrays are [requests].

    Attributes:
        num_computed: tokens whose K and V are in the cache already.
        query_len: tokens that this forward computes.
        prompt_len: length of the prompt.
        first_token: token id at position 0.
        wants_all_rows: whether more than the sampled rows' output is read (prompt
            log-probabilities).
    """

    num_computed: Ints
    query_len: Ints
    prompt_len: Ints
    first_token: Ints
    wants_all_rows: bool = False

    @cached_property
    def prompt_tokens(self) -> Ints:
        """How many of each request's computed tokens belong to its prompt (rule 5)."""
        return np.minimum(np.maximum(self.prompt_len - self.num_computed, 0), self.query_len)


@dataclass(frozen=True)
class Plan:
    """The rows of one forward that selective layers choose from. Rows index the batch's tokens.

    A *segment* is the part of one request's window that this forward computes. Only segments that
    leave some token out are here; the tokens of the others are among `forced_rows`.

    Attributes:
        candidates: [C] rows to choose from, ascending.
        segment: [C] segment of each candidate, ascending from 0.
        request: [C] index of each candidate's request among `requests`.
        at_position_0: indices into `candidates` of sink tokens, which are never chosen.
        top_k_slots: [K] for candidates sorted by (segment, score): which to take.
        forced_rows: [A] rows selected whatever their score, ascending.
        requests: [R] batch indices of the requests that have candidates.
        first_token: [R] their token ids at position 0.
        sink_row: [R] row of their position 0, or -1 where this forward lacks it.
        selected_per_request: [batch] selected rows of each request; a prompt's last token that is
            also chosen is counted twice (see `topk.select`).
        sampled_rows: [N] rows whose output is read, ascending: each request's last, its prompt's
            last, and all past its prompt. None if all are.
        sampled_per_request: [batch] how many those are.
        num_tokens: rows in the batch.
        window: positions per window, 0 for the whole prompt.
        batch: what the plan was made of.
    """

    candidates: Ints
    segment: Ints
    request: Ints
    at_position_0: Ints
    top_k_slots: Ints
    forced_rows: Ints
    requests: Ints
    first_token: Ints
    sink_row: Ints
    selected_per_request: Ints
    sampled_rows: Ints | None
    sampled_per_request: Ints
    num_tokens: int
    window: int
    batch: Batch

    @property
    def num_selected(self) -> int:
        """Rows that a selective layer updates, duplicates included."""
        return len(self.top_k_slots) + len(self.forced_rows)


def make_plan(batch: Batch, keep: float, window: int) -> Plan | None:
    """Apply rules 3 to 5 to one forward.

    Args:
        keep: fraction of a segment that is selected, in (0, 1).
        window: positions per window; 0 is one window for the whole prompt.

    Returns:
        None if every token is selected, so that the dense forward is the same.
    """
    if not batch.prompt_tokens.any():
        return None
    rows = _locate(batch)
    segments = _cut(batch, rows, keep, window)
    if not len(segments.first_row):
        return None
    return _assemble(batch, rows, segments, window)


class _Rows(NamedTuple):
    """Where each row stands. All arrays are [tokens].

    Attributes:
        request: index in the batch.
        is_prompt_end: the last token of a prompt.
    """

    request: Ints
    position: Ints
    is_prompt: Bools
    is_prompt_end: Bools


class _Segments(NamedTuple):
    """The segments that leave some token out: runs of neighbouring rows. All arrays are [segments].

    Attributes:
        top_k: how many are chosen.
    """

    first_row: Ints
    size: Ints
    top_k: Ints


def _locate(batch: Batch) -> _Rows:
    request = np.repeat(np.arange(len(batch.query_len)), batch.query_len)
    position = _expand(batch.num_computed, batch.query_len)
    prompt_len = batch.prompt_len[request]
    return _Rows(request, position, position < prompt_len, position == prompt_len - 1)


def _cut(batch: Batch, rows: _Rows, keep: float, window: int) -> _Segments:
    """Rule 3, but for the choice itself; and position 0 is never chosen (rule 4)."""
    prompt_rows = np.flatnonzero(rows.is_prompt)
    position = rows.position[prompt_rows]
    window_index = position // window if window else np.zeros_like(position)
    start = np.flatnonzero(_begins(rows.request[prompt_rows]) | _begins(window_index))
    size = np.diff(start, append=len(prompt_rows))
    top_k = np.ceil(keep * size - 1e-9).astype(np.int64)
    has_sink = (position[start] == 0) & (batch.prompt_len[rows.request[prompt_rows[start]]] > 1)
    top_k = np.where(has_sink, np.minimum(top_k, size - 1), top_k)
    leaves_out = top_k < size
    return _Segments(prompt_rows[start[leaves_out]], size[leaves_out], top_k[leaves_out])


def _forced_rows(rows: _Rows, candidates: Ints) -> Ints:
    """Rules 4 and 5: all that nobody chooses from, and the end of each prompt."""
    is_forced = np.ones(len(rows.request), dtype=np.bool_)
    is_forced[candidates] = False
    return np.flatnonzero(is_forced | rows.is_prompt_end)


def _sampled_rows(batch: Batch, rows: _Rows) -> Ints:
    # vLLM reads a request's last row and, before that, each row that a guess follows (speculation).
    # The first of these can be the prompt's last: a request with a single token left is given
    # placeholders for guesses at once (vllm/v1/core/sched/scheduler.py, `pad_spec_decode`).
    is_sampled = ~rows.is_prompt | rows.is_prompt_end
    is_sampled[np.cumsum(batch.query_len) - 1] = True
    return np.flatnonzero(is_sampled)


def _assemble(batch: Batch, rows: _Rows, segments: _Segments, window: int) -> Plan:
    candidates = _expand(segments.first_row, segments.size)
    forced_rows = _forced_rows(rows, candidates)
    sampled_rows = _sampled_rows(batch, rows)
    request_of_segment = rows.request[segments.first_row]
    is_first = _begins(request_of_segment)
    requests = request_of_segment[is_first]
    first_row = np.cumsum(batch.query_len) - batch.query_len

    def per_request(request: Ints, weights: Ints | None = None) -> Ints:
        return np.bincount(request, weights, minlength=len(batch.query_len)).astype(np.int64)

    chosen_per_request = per_request(request_of_segment, segments.top_k)
    return Plan(
        candidates=candidates,
        segment=np.repeat(np.arange(len(segments.size)), segments.size),
        request=np.repeat(np.cumsum(is_first) - 1, segments.size),
        at_position_0=np.flatnonzero(rows.position[candidates] == 0),
        top_k_slots=_expand(np.cumsum(segments.size) - segments.size, segments.top_k),
        forced_rows=forced_rows,
        requests=requests,
        first_token=batch.first_token[requests],
        sink_row=np.where(batch.num_computed[requests] == 0, first_row[requests], -1),
        selected_per_request=chosen_per_request + per_request(rows.request[forced_rows]),
        sampled_rows=None if batch.wants_all_rows else sampled_rows,
        sampled_per_request=per_request(rows.request[sampled_rows]),
        num_tokens=len(rows.request),
        window=window,
        batch=batch,
    )


def _expand(first: Ints, count: Ints) -> Ints:
    """`first[i], first[i] + 1, …`, `count[i]` of them for each i, one after the other."""
    before = np.cumsum(count) - count
    return np.arange(count.sum()) + np.repeat(first - before, count)


def _begins(values: Ints) -> Bools:
    """Where a run of equal values begins."""
    found = np.ones(len(values), dtype=np.bool_)
    found[1:] = np.diff(values) != 0
    return found


def profile_run_batch(num_tokens: int, most_requests: int) -> Batch:
    """The batch of so many tokens that needs most memory: as many prompts as there can be.

    Each of them rounds up what it selects, and is scored against a sink of its own.
    """
    requests = min(most_requests, max(num_tokens // 2, 1))
    length = np.full(requests, num_tokens // requests, dtype=np.int64)
    length[-1] += num_tokens % requests
    nothing = np.zeros_like(length)
    return Batch(nothing, length, length, first_token=nothing, wants_all_rows=True)
