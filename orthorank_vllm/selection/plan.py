"""Which rows of a batch a selective layer chooses from.

Made on the host from exact numbers, before the forward: the counts, and so
every tensor shape of the sparse forward, are known without asking the device.
The rule is numbered as in README.md, "The selection rule".
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from orthorank_vllm.selection.quotas import Bools, Competition, Quota, expand, make_quotas
from orthorank_vllm.selection.quotas import Ints as Ints

# Longer than any that a way to attend is chosen by.
LONG_CONTEXT = 1 << 20


@dataclass(frozen=True)
class Batch:
    """One forward's requests, in batch order. All arrays are [requests].

    Attributes:
        num_computed: tokens whose K and V are in the cache already.
        query_len: tokens that this forward computes.
        prompt_len: length of the prompt.
        first_token: token id at position 0; any where there is an embedding instead.
        wants_all_rows: whether more than the sampled rows' output is read (prompt
            log-probabilities).
        num_selective: how many of the selective layers, the first of their order, skip tokens of
            each prompt; None: all of them.
        adapter: a number for each request's adapter, 0 for none; None: none has one.
        first_embedding: [hidden] what some requests were given at position 0 instead of a token, by
            their index.
    """

    num_computed: Ints
    query_len: Ints
    prompt_len: Ints
    first_token: Ints
    wants_all_rows: bool = False
    num_selective: Ints | None = None
    adapter: Ints | None = None
    first_embedding: Mapping[int, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def sinks(self) -> list[tuple[int | bytes, int]]:
        """What the state of each request's position 0 depends on.

        Its token id, or the hash of its embedding, and its adapter.
        """
        adapter = np.zeros_like(self.first_token) if self.adapter is None else self.adapter
        first: list[int | bytes] = [*self.first_token.tolist()]
        for request, embedding in self.first_embedding.items():
            first[request] = _digest(embedding)
        return list(zip(first, adapter.tolist(), strict=True))

    @cached_property
    def first_row(self) -> Ints:
        """The row of each request's first computed token."""
        return np.cumsum(self.query_len) - self.query_len

    @cached_property
    def prompt_tokens(self) -> Ints:
        """How many of each request's computed tokens belong to its prompt (rule 5)."""
        return np.minimum(np.maximum(self.prompt_len - self.num_computed, 0), self.query_len)


@dataclass(frozen=True)
class Plan:
    """The rows of one forward that selective layers choose from. Rows index the batch's tokens.

    A *segment* is the part of one request's window that this forward computes, without the rows
    that are computed in any case.

    Attributes:
        candidates: [C] rows to choose from, ascending; each segment's are neighbours.
        segment: [C] segment of each candidate, ascending from 0.
        request: [C] index of each candidate's request among `requests`.
        forced_rows: [A] all other rows, ascending: selected in every layer.
        requests: [R] batch indices of the requests that have candidates.
        sink_row: [R] row of their position 0, or -1 where this forward lacks it.
        quotas: of each selective layer, in their order, see `make_quotas`.
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
    forced_rows: Ints
    requests: Ints
    sink_row: Ints
    quotas: Sequence[Quota | None]
    sampled_rows: Ints | None
    sampled_per_request: Ints
    num_tokens: int
    window: int
    batch: Batch

    @cached_property
    def different_quotas(self) -> list[Quota]:
        """Each of them once."""
        return [quota for quota in dict.fromkeys(self.quotas) if quota is not None]

    @cached_property
    def scored(self) -> list[Quota]:
        """Those with which there is something to choose."""
        return [quota for quota in self.different_quotas if quota.rows is None]


def make_plan(batch: Batch, keeps: Iterable[float], window: int, tail: int) -> Plan | None:
    """Apply rules 3 to 5 to one forward.

    Args:
        keeps: of each selective layer, in their order, the fraction of a segment that is selected,
            in [0, 1).
        window: positions per window; 0 is one window for the whole prompt.
        tail: last tokens of each prompt that are always selected, at least 1.

    Returns:
        None if every token is selected, so that the dense forward is the same.
    """
    if not batch.prompt_tokens.any():
        return None
    rows = _locate(batch)
    candidates = np.flatnonzero(_competes(batch, rows, tail))
    if not len(candidates):
        return None
    rivals = _cut(batch, rows, candidates, window)
    quotas = make_quotas(rivals, list(keeps), batch.num_selective)
    if all(quota is None or len(quota.top_k_slots) == len(candidates) for quota in quotas):
        return None
    is_first = _begins(rivals.request)
    requests = rivals.request[is_first]
    sampled_rows = _sampled_rows(batch, rows)
    return Plan(
        candidates=candidates,
        segment=np.repeat(np.arange(len(rivals.size)), rivals.size),
        request=np.repeat(np.cumsum(is_first) - 1, rivals.size),
        forced_rows=rivals.forced_rows,
        requests=requests,
        sink_row=np.where(batch.num_computed[requests] == 0, batch.first_row[requests], -1),
        quotas=quotas,
        sampled_rows=None if batch.wants_all_rows else sampled_rows,
        sampled_per_request=np.bincount(rows.request[sampled_rows], minlength=len(batch.query_len)),
        num_tokens=len(rows.request),
        window=window,
        batch=batch,
    )


def _digest(embedding: torch.Tensor) -> bytes:
    return hashlib.sha256(embedding.detach().contiguous().view(torch.uint8).numpy()).digest()


class _Rows(NamedTuple):
    """Where each row stands. All arrays are [tokens].

    Attributes:
        request: index in the batch.
        position: in its sequence.
        prompt_len: of its request.
    """

    request: Ints
    position: Ints
    prompt_len: Ints


def _locate(batch: Batch) -> _Rows:
    request = np.repeat(np.arange(len(batch.query_len)), batch.query_len)
    return _Rows(request, expand(batch.num_computed, batch.query_len), batch.prompt_len[request])


def _competes(batch: Batch, rows: _Rows, tail: int) -> Bools:
    """Rules 4 and 5: prompt tokens do, but for position 0 and each prompt's tail."""
    competes = (rows.position > 0) & (rows.position < rows.prompt_len - tail)
    if batch.num_selective is not None:
        competes &= (batch.num_selective > 0)[rows.request]
    return competes


def _cut(batch: Batch, rows: _Rows, candidates: Ints, window: int) -> Competition:
    """The windows of rule 3."""
    request = rows.request[candidates]
    begins = _begins(request)
    if window:
        begins |= _begins(rows.position[candidates] // window)
    start = np.flatnonzero(begins)
    forced_rows = _others(rows, candidates)
    return Competition(
        candidates=candidates,
        forced_rows=forced_rows,
        forced_per_request=np.bincount(rows.request[forced_rows], minlength=len(batch.query_len)),
        start=start,
        size=np.diff(start, append=len(candidates)),
        request=request[start],
    )


def _others(rows: _Rows, candidates: Ints) -> Ints:
    is_other = np.ones(len(rows.request), dtype=np.bool_)
    is_other[candidates] = False
    return np.flatnonzero(is_other)


def _sampled_rows(batch: Batch, rows: _Rows) -> Ints:
    # vLLM reads a request's last row and, before that, each row that a guess follows (speculation).
    # The first of these can be the prompt's last: a request with a single token left is given
    # placeholders for guesses at once (vllm/v1/core/sched/scheduler.py, `pad_spec_decode`).
    is_sampled = rows.position >= rows.prompt_len - 1
    is_sampled[np.cumsum(batch.query_len) - 1] = True
    return np.flatnonzero(is_sampled)


def _begins(values: Ints) -> Bools:
    """Where a run of equal values begins."""
    found = np.ones(len(values), dtype=np.bool_)
    found[1:] = np.diff(values) != 0
    return found


def profile_run_batches(
    num_tokens: int, most_requests: int, keeps: Sequence[float], tail: int
) -> tuple[Batch, Batch]:
    """Two batches of so many tokens, one of which any other needs no more memory than.

    As many prompts as there can be: each is scored against a sink of its own, rounds up what it
    selects, has a tail, and is long enough that something of it is skipped at each keep; in layers
    of as many kinds as there can be, by requests of as many ratios. And as
    many selected rows as there can be, an answer that is computed again after a preemption, beside
    a request that decodes after a long context.
    """
    skipping = int(1 / (1 - max(keeps, default=0.0))) + 1
    least = tail + 1 + skipping
    requests = min(most_requests, max(num_tokens // least, 1))
    length = np.full(requests, num_tokens // requests, dtype=np.int64)
    length[-1] += num_tokens % requests
    # Fewer tokens than that are a chunk of a longer prompt.
    prompt_len = np.where(length < least, length + tail, length)
    nothing = np.zeros_like(length)
    selective = len(keeps) - np.arange(requests) % max(len(keeps), 1)
    prompts = Batch(nothing, length, prompt_len, nothing, True, num_selective=selective)
    if num_tokens == 1:
        return prompts, prompts
    again = num_tokens - 1
    short_prompt = least if least < again else again + tail
    computed, query_len, prompt_len, first_token = np.array(
        [(0, again, short_prompt, 0), (LONG_CONTEXT, 1, 1, 0)], dtype=np.int64
    ).T
    return prompts, Batch(computed, query_len, prompt_len, first_token, wants_all_rows=True)
