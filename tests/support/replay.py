"""Drive the real engine step by step, then replay what it scheduled on the reference.

The engine decides the schedule (chunks, prefix-cache hits, preemption); it is
read off vLLM's own scheduler, and the reference computes the same forwards.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams

from orthorank_vllm.model.stand_in import FusedStandIn, StandIn
from orthorank_vllm.options import LayerKeep
from tests.support.reference import Reference, Request, Rule

TOLERANCE = 1e-3
# A choice closer than this may fall either way by float noise alone, and then two
# correct implementations differ: a difference proves something only above it.
SAFE_MARGIN = 1e-6
# In a row without a token: more than any pipeline makes.
IDLE_STEPS = 1000


@dataclass
class Job:
    """One request to the engine and what came back of it.

    `ratio`: what it asks for, if anything; `lora`: its adapter, vLLM's `LoRARequest`; `given`: what
    vLLM is given as the prompt, where that is more than its token ids.
    """

    prompt: list[int]
    max_tokens: int = 1
    arrives: int = 0
    want_prompt_logprobs: bool = True
    ratio: float | None = None
    lora: Any = None
    given: Any = None
    output: Any = None

    @property
    def generated(self) -> list[int]:
        return list(self.output.outputs[0].token_ids)


@dataclass(frozen=True)
class Scheduled:
    """One request's part in one forward."""

    request_id: str
    num_computed: int
    num_tokens: int


def answer(prompt: list[int], tokens: int = 3, arrives: int = 0, **asked: Any) -> Job:
    """A job that may find its prompt in the cache: none that wants its log-probabilities does."""
    return Job(prompt, tokens, arrives, want_prompt_logprobs=False, **asked)


@dataclass
class Run:
    """Jobs, and every forward that the scheduler made of them."""

    jobs: dict[str, Job] = field(default_factory=dict)
    forwards: list[list[Scheduled]] = field(default_factory=list)

    def chunks(self, job: Job) -> list[Scheduled]:
        """The parts of one job, in order."""
        wanted = next(name for name, other in self.jobs.items() if other is job)
        return [part for forward in self.forwards for part in forward if part.request_id == wanted]

    def of_ratio(self, ratio: float | None) -> "Run":
        """The requests that asked for this ratio."""
        jobs = {name: job for name, job in self.jobs.items() if job.ratio == ratio}
        return Run(
            jobs, [[part for part in parts if part.request_id in jobs] for parts in self.forwards]
        )


def fused(rule: Rule) -> dict[int, FusedStandIn]:
    """A rule's stand-ins as the package takes them."""
    return {
        layer: StandIn(*parts).fused(torch.device("cpu"), parts[0].dtype)
        for layer, parts in rule.stand_ins.items()
    }


class Engine:
    """vLLM's engine in this process."""

    def __init__(self, model_path: str, **options: Any) -> None:
        # vLLM compiles a part of its sampler, eager model or not: some seconds in each process.
        torch._dynamo.config.disable = True
        self.llm = LLM(model_path, dtype="float32", **options)
        engine_core: Any = self.llm.llm_engine.engine_core
        self.core = engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.default_budget = self.scheduler.max_num_scheduled_tokens

    def close(self) -> None:
        """End the engine now.

        An engine that is merely dropped ends when it is collected, and takes the process groups of
        the next one in this process with it.
        """
        self.llm.llm_engine.engine_core.shutdown()

    @property
    def runner(self) -> Any:
        return self.core.model_executor.driver_worker.worker.model_runner

    @property
    def model(self) -> Any:
        return self.runner.get_model()

    def use(self, rule: Rule) -> None:
        """Serve by another rule from now on; nothing of what was is remembered.

        The prefix cache goes on to leave out as long a tail as the engine began with.
        """
        orthorank = self.model.orthorank
        config = replace(orthorank.config, window=rule.window, tail=rule.tail)
        layers = [LayerKeep(*pair) for pair in rule.layers.items()]
        stand_ins = fused(rule)
        config = replace(config, stand_in="a test's" if stand_ins else "")
        orthorank.use_layers(config.with_layers(layers, "a test"), stand_ins)
        self.llm.reset_prefix_cache()

    def forget_sinks(self) -> None:
        """As after a restart: what is not recomputed is not there."""
        sinks = self.model.orthorank._sinks
        sinks.clear()
        sinks.rows.fill_(torch.nan)

    def run(self, jobs: Sequence[Job], budget: Callable[[int], int] | None = None) -> Run:
        """Serve the jobs.

        Args:
            budget: step number to the most tokens that this step may schedule.
        """
        engine = self.llm.llm_engine
        run = Run()
        waiting = sorted(jobs, key=lambda job: job.arrives)
        names: dict[str, Job] = {}
        schedule = self.scheduler.schedule

        idle = 0

        def recorded(*args: Any, **kwargs: Any) -> Any:
            nonlocal idle
            output = schedule(*args, **kwargs)
            cached = output.scheduled_cached_reqs
            computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            for new in output.scheduled_new_reqs:
                computed[new.req_id] = new.num_computed_tokens
            idle = 0 if output.num_scheduled_tokens else idle + 1
            assert idle < IDLE_STEPS, "no request gets on: the budget has no room for a window"
            if output.num_scheduled_tokens:
                run.forwards.append(
                    [
                        Scheduled(name, computed[name], count)
                        for name, count in output.num_scheduled_tokens.items()
                    ]
                )
            return output

        self.scheduler.schedule = recorded
        try:
            step = 0
            while waiting or engine.has_unfinished_requests():
                while waiting and waiting[0].arrives <= step:
                    job = waiting.pop(0)
                    external = f"job-{len(names)}"
                    params = SamplingParams(
                        temperature=0,
                        max_tokens=job.max_tokens,
                        ignore_eos=True,
                        logprobs=5,
                        prompt_logprobs=0 if job.want_prompt_logprobs else None,
                        extra_args=None if job.ratio is None else {"orthorank_ratio": job.ratio},
                    )
                    prompt: Any = job.given or {"prompt_token_ids": job.prompt}
                    name = engine.add_request(external, prompt, params, lora_request=job.lora)
                    names[external] = job
                    run.jobs[name] = job
                self.scheduler.max_num_scheduled_tokens = (
                    budget(step) if budget else self.default_budget
                )
                for output in engine.step():
                    if output.finished:
                        names[output.request_id].output = output
                step += 1
        finally:
            self.scheduler.schedule = schedule
            self.scheduler.max_num_scheduled_tokens = self.default_budget
        return run


@dataclass
class Verdict:
    """How far the engine is from the reference.

    Attributes:
        worst: largest difference of a log-probability.
        compared: how many log-probabilities were compared.
        margin: see `reference.Request.margin`, over all requests.
        requests: the reference's requests, by the run's request ids.
    """

    worst: float = 0.0
    compared: int = 0
    margin: float = math.inf
    requests: dict[str, Request] = field(default_factory=dict)


def replay(run: Run, reference: Reference, earlier: Sequence[Request] = ()) -> Verdict:
    """Compute the run's forwards on the reference and compare every log-probability.

    Args:
        earlier: requests of earlier runs that may have left K and V in the prefix cache.
    """
    verdict = Verdict()
    requests = verdict.requests
    seen: set[tuple[str, int]] = set()
    parts = {name: run.chunks(job) for name, job in run.jobs.items()}
    for forward in run.forwards:
        for part in forward:
            job = run.jobs[part.request_id]
            later = parts[part.request_id]
            later.pop(0)
            request = requests.get(part.request_id)
            # A guess that was not accepted was no token of the request: its row says nothing, and
            # its position is computed again once there is one.
            known = len(job.prompt) + len(job.generated) - 1
            start, end = part.num_computed, min(part.num_computed + part.num_tokens, known)
            if start >= end:
                continue
            if request is None:
                request = _begin(reference, job.prompt, start, [*earlier, *requests.values()])
                requests[part.request_id] = request
            elif start < request.computed:
                request.restart(start)
            for token in job.generated[len(request.tokens) - request.prompt_len :]:
                if len(request.tokens) < end:
                    request.append(token)
            log_probs = request.forward(start, end)
            for position in range(start, _sampled_end(job, part, later, end)):
                # A position that is computed again is not sampled from again.
                if (part.request_id, position) not in seen:
                    seen.add((part.request_id, position))
                    _compare(verdict, job, position, log_probs[position - start])
    verdict.margin = min((request.margin for request in requests.values()), default=math.inf)
    return verdict


def _sampled_end(job: Job, part: Scheduled, later: Sequence[Scheduled], end: int) -> int:
    """The end of a part's positions that were sampled from: some of its guesses may be wrong.

    It is where the request goes on; with a preemption in between, one before, as that position is
    computed anew together with all before it, and sampled from then.
    """
    if part.num_computed < len(job.prompt):
        return end
    ends = (other.num_computed for other in later if other.num_computed > part.num_computed)
    is_preempted = bool(later) and later[0].num_computed <= part.num_computed
    return min(end, next(ends, end + is_preempted) - is_preempted)


def check(run: Run, reference: Reference, earlier: Sequence[Request] = ()) -> Verdict:
    """`replay`, and that the two agree."""
    verdict = replay(run, reference, earlier)
    assert verdict.compared
    assert verdict.worst < TOLERANCE, (
        "a wrong result"
        if verdict.margin > SAFE_MARGIN
        else "perhaps a choice that float noise made: take other prompts"
    )
    return verdict


def is_resumed(run: Run, job: Job) -> bool:
    """Whether a job was preempted and began again."""
    starts = (part.num_computed for part in run.chunks(job))
    return any(later < earlier for earlier, later in itertools.pairwise(starts))


def counted(name: str) -> float:
    """One of our counters on the registry of this process, which has the engine."""
    samples = (sample for family in REGISTRY.collect() for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name == f"orthorank_{name}_total")


def _begin(
    reference: Reference, prompt: list[int], cached: int, donors: Sequence[Request]
) -> Request:
    if cached == 0:
        return reference.start(prompt)
    for donor in donors:
        if donor.computed >= cached and donor.tokens[:cached] == prompt[:cached]:
            return donor.fork(prompt, cached)
    raise AssertionError(f"the engine found {cached} cached tokens that no request computed")


def _compare(verdict: Verdict, job: Job, position: int, log_probs: torch.Tensor) -> None:
    """The distribution at `position` is that of the token at `position + 1`."""
    following = position + 1
    if following < len(job.prompt):
        told = job.output.prompt_logprobs
        entries = told[following] if told else {}
    else:
        entries = job.output.outputs[0].logprobs[following - len(job.prompt)]
    for token, entry in entries.items():
        difference = abs(entry.logprob - float(log_probs[token]))
        # NaN must not pass for agreement.
        verdict.worst = max(verdict.worst, difference if difference == difference else math.inf)
        verdict.compared += 1
