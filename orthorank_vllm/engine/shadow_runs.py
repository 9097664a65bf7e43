"""Dense re-runs of finished prompts, one at a time, in steps in which nothing else could begin.

vllm/v1/core/sched/scheduler.py: every request is in `requests`, and in `waiting` or `running`. A
re-run is one like any other, asked for a single token, which nobody gets. While others wait or are
in their prompts it is taken out of `running` for the step, and it is ended as soon as somebody
needs its blocks. It reads nothing of the prefix cache and leaves nothing there: its blocks are the
next to be taken, and what they held before is the most that others lose.
"""

import logging
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.engine.shadow import rerun_args, shadow_of
from orthorank_vllm.metrics.definitions import BUSY, FAILED, NO_ROOM
from orthorank_vllm.metrics.recorder import labels_of
from orthorank_vllm.metrics.shadow import DroppedCounter

# vLLM shows the log lines of its own namespace only.
logger = logging.getLogger("vllm.orthorank")

# Prompts that are kept for a re-run, and for how long; the oldest go first.
MOST_PROMPTS = 16
MOST_SECONDS = 60.0
# Until a re-run that found no room beside others' answers is tried again.
RETRY_SECONDS = 1.0
# Of a re-run in one step: a request that comes then waits for so many, and beside others' answers
# each of their steps is so much longer.
STEP_TOKENS = 512
STEP_TOKENS_BESIDE = 64
# Behind any that a client can ask for, which are 64 bits.
LOWEST_PRIORITY = 1 << 64


class _Prompt(NamedTuple):
    original: str
    token_ids: list[int]
    since: float


def add_reruns(scheduler: Any, config: OrthoRankConfig) -> None:
    """Let a scheduler run some prompts once more, where that was asked for.

    Args:
        scheduler: vLLM's `Scheduler`; other engines' in this process stay as they are.
    """
    if config.shadow:
        dropped = DroppedCounter.of_scheduler(labels_of(scheduler.vllm_config))
        ShadowRuns(scheduler, config, dropped).attach()


class ShadowRuns:
    """The re-runs of one engine."""

    def __init__(self, scheduler: Any, config: OrthoRankConfig, dropped: DroppedCounter) -> None:
        self._scheduler = scheduler
        self._config = config
        self._dropped = dropped
        # Drawn, and not through their prompts yet.
        self._watched: dict[str, Any] = {}
        self._prompts: deque[_Prompt] = deque()
        self._rerun: Any = None
        # Of what prompt it is, and when a prompt may be tried again.
        self._prompt: _Prompt | None = None
        self._not_before = 0.0
        self._is_off = False
        self._add, self._finish = scheduler.add_request, scheduler.finish_requests

    def attach(self) -> None:
        """Put this around the scheduler's methods."""
        scheduler, manager = self._scheduler, self._scheduler.kv_cache_manager
        schedule, update = scheduler.schedule, scheduler.update_from_output
        has_requests, reset = scheduler.has_requests, scheduler.reset_prefix_cache
        allocate, cache = manager.allocate_slots, manager.coordinator.cache_blocks

        def add_request(request: Any) -> None:
            self._add(request)
            self._safely(self._watch, request)

        def schedule_with_rerun(*args: Any, **kwargs: Any) -> Any:
            if not self._prompts and self._rerun is None:
                return schedule(*args, **kwargs)
            most_tokens = scheduler.max_num_scheduled_tokens
            self._safely(self._before_step)
            try:
                return schedule(*args, **kwargs)
            finally:
                scheduler.max_num_scheduled_tokens = most_tokens
                self._safely(self._after_step)

        def update_from_output(step: Any, output: Any) -> Any:
            told = update(step, output)
            self._safely(self._take, step, told)
            return told

        def finish_requests(request_ids: Any, status: Any) -> Any:
            if request_ids is None:
                self._safely(self._forget)
            finished = self._finish(request_ids, status)
            self._safely(self._unwatch)
            return finished

        def has_requests_or_prompts() -> Any:
            return has_requests() or (bool(self._prompts) and not self._is_paused)

        def reset_prefix_cache(*args: Any, **kwargs: Any) -> Any:
            self._safely(self._end, BUSY)
            return reset(*args, **kwargs)

        def allocate_slots(request: Any, *args: Any, **kwargs: Any) -> Any:
            blocks = allocate(request, *args, **kwargs)
            if blocks is None and self._rerun is not None and request is not self._rerun:
                self._safely(self._end, NO_ROOM)
                blocks = allocate(request, *args, **kwargs)
            return blocks

        def cache_blocks(request: Any, *args: Any, **kwargs: Any) -> None:
            if request is not self._rerun:
                cache(request, *args, **kwargs)

        # For who looks at it from outside: a benchmark.
        scheduler.orthorank_reruns = self
        scheduler.add_request, scheduler.finish_requests = add_request, finish_requests
        scheduler.schedule = schedule_with_rerun
        scheduler.update_from_output = update_from_output
        scheduler.has_requests = has_requests_or_prompts
        scheduler.reset_prefix_cache = reset_prefix_cache
        manager.allocate_slots = allocate_slots
        manager.coordinator.cache_blocks = cache_blocks

    @property
    def _is_paused(self) -> bool:
        state = getattr(self._scheduler, "pause_state", None)
        return state is not None and state.name != "UNPAUSED"

    def _safely(self, what: Callable[..., None], *args: Any) -> None:
        """Do a part of this; the engine serves on without re-runs where that fails."""
        if self._is_off:
            return
        try:
            what(*args)
        except Exception as error:
            self._is_off = True
            logger.warning(
                "OrthoRank compares no more prompts with dense re-runs: an error in its scheduling "
                "(%s: %s). No answer is concerned.",
                type(error).__name__,
                error,
            )
            self._dropped.count(FAILED)
            self._watched.clear()
            self._prompts.clear()
            rerun, self._rerun = self._rerun, None
            if rerun is not None and not rerun.is_finished():
                self._finish([rerun.request_id], RequestStatus.FINISHED_ABORTED)

    def _watch(self, request: Any) -> None:
        is_there = self._scheduler.requests.get(request.request_id) is request
        # Of a prompt that comes in parts none is the whole, and its last one is no request.
        comes_in_parts = getattr(request, "resumable", False)
        if not is_there or comes_in_parts:
            return
        if shadow_of(self._config, request.request_id, request, request.num_prompt_tokens):
            self._watched[request.request_id] = request

    def _unwatch(self) -> None:
        for name, request in list(self._watched.items()):
            if request.is_finished():
                del self._watched[name]

    def _before_step(self) -> None:
        """Begin a re-run or go on with one where nothing else could begin; else leave it out."""
        now = time.monotonic()
        while self._prompts and self._prompts[0].since < now - MOST_SECONDS:
            self._prompts.popleft()
            self._dropped.count(BUSY)
        if self._is_paused:
            # Whoever paused the engine waits until nothing runs.
            self._end(BUSY)
            return
        scheduler, rerun = self._scheduler, self._rerun
        others = [request for request in scheduler.running if request is not rerun]
        if not self._is_quiet(others):
            if rerun is not None:
                scheduler.running.remove(rerun)
            return
        if rerun is None and self._prompts and (not others or now >= self._not_before):
            self._prompt = self._prompts.popleft()
            self._rerun = _rerun_of(self._prompt)
            self._add(self._rerun)
        needed = sum(
            each.num_tokens_with_spec + each.num_output_placeholders - each.num_computed_tokens
            for each in others
        )
        scheduler.max_num_scheduled_tokens = min(
            scheduler.max_num_scheduled_tokens,
            needed + (STEP_TOKENS_BESIDE if others else STEP_TOKENS),
        )

    def _is_quiet(self, others: list[Any]) -> bool:
        scheduler = self._scheduler
        _, num_waiting = scheduler.get_request_counts()
        return (
            num_waiting == 0
            and len(others) < scheduler.max_num_running_reqs
            and all(each.num_computed_tokens >= each.num_prompt_tokens for each in others)
        )

    def _after_step(self) -> None:
        """Put a re-run back that was left out; end one that found no place."""
        rerun, running = self._rerun, self._scheduler.running
        if rerun is None or rerun in running:
            return
        if rerun.status == RequestStatus.RUNNING:
            running.append(rerun)
        elif rerun.status == RequestStatus.WAITING and running and self._prompt is not None:
            # Nothing of it was computed.
            self._rerun = None
            self._finish([rerun.request_id], RequestStatus.FINISHED_ABORTED)
            self._prompts.appendleft(self._prompt)
            self._not_before = time.monotonic() + RETRY_SECONDS
        else:
            self._end(NO_ROOM)

    def _take(self, step: Any, told: Any) -> None:
        """Keep a re-run's output from clients, and the prompts that are through for a re-run."""
        rerun = self._rerun
        if rerun is not None and rerun.request_id in step.num_scheduled_tokens:
            for each in told.values():
                each.outputs = [
                    output for output in each.outputs if output.request_id != rerun.request_id
                ]
            if rerun.is_finished():
                self._rerun = None
        for name in self._watched.keys() & step.num_scheduled_tokens.keys():
            request = self._watched[name]
            if request.num_output_tokens:
                prompt = _Prompt(name, request.prompt_token_ids, time.monotonic())
                self._prompts.append(prompt)
            if request.num_output_tokens or request.is_finished():
                del self._watched[name]
        while len(self._prompts) > MOST_PROMPTS:
            self._prompts.popleft()
            self._dropped.count(BUSY)

    def _end(self, reason: str) -> None:
        """End the re-run, if there is one."""
        rerun, self._rerun = self._rerun, None
        if rerun is not None:
            self._finish([rerun.request_id], RequestStatus.FINISHED_ABORTED)
            self._dropped.count(reason)

    def _forget(self) -> None:
        self._end(BUSY)
        self._prompts.clear()


def _rerun_of(prompt: _Prompt) -> Any:
    return Request(
        request_id=f"orthorank-shadow-{uuid.uuid4().hex}",
        prompt_token_ids=prompt.token_ids,
        sampling_params=SamplingParams(
            max_tokens=1,
            temperature=0.0,
            skip_reading_prefix_cache=True,
            extra_args=rerun_args(prompt.original),
        ),
        pooling_params=None,
        priority=LOWEST_PRIORITY,
    )
