"""Model Runner V1: make each forward's plan and hand it to the model.

vllm/v1/worker/gpu_model_runner.py: `_model_forward` is called by `execute_model`
alone, never by warm-up, and is documented as the place to override.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context

from orthorank_vllm.engine.step_stats import Seconds
from orthorank_vllm.selection.plan import Batch

_MARK = "_orthorank_hook"


def batch_of(runner: Any) -> Batch | None:
    """This step's requests, None where none of them has prompt tokens left.

    From the runner's host-side arrays (no device access).
    """
    inputs = runner.input_batch
    num_reqs = inputs.num_reqs
    num_computed = inputs.num_computed_tokens_cpu[:num_reqs]
    prompt_len = inputs.num_prompt_tokens[:num_reqs]
    # All that a step of decoding pays for this plugin, beside its count.
    if not np.count_nonzero(num_computed < prompt_len):
        return None
    return Batch(
        num_computed=num_computed.astype(np.int64),
        query_len=np.diff(runner.query_start_loc.np[: num_reqs + 1]).astype(np.int64),
        prompt_len=prompt_len.astype(np.int64),
        first_token=inputs.token_ids_cpu[:num_reqs, 0].astype(np.int64),
        wants_all_rows=bool(runner.num_prompt_logprobs),
    )


def with_plan(model_forward: Callable[..., Any]) -> Callable[..., Any]:
    """`_model_forward`, with the plan as one more model input where one is needed."""

    @functools.wraps(model_forward)
    def _model_forward(self: Any, *args: Any, **model_kwargs: Any) -> Any:
        orthorank = getattr(self.get_model(), "orthorank", None)
        if orthorank is None:
            return model_forward(self, *args, **model_kwargs)
        started = time.perf_counter()
        batch = batch_of(self)
        # A step that is replayed from a full CUDA graph does not run the model: steps as long as
        # decoding's, prompts of one token among them. Those are dense.
        is_replayed = get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.FULL
        plan = None if batch is None or is_replayed else orthorank.plan(batch)
        planned = time.perf_counter()
        if plan is not None:
            model_kwargs["orthorank_plan"] = plan
        output = model_forward(self, *args, **model_kwargs)
        seconds = Seconds(plan=planned - started, forward=time.perf_counter() - planned)
        orthorank.count(batch, plan, seconds)
        return output

    setattr(_model_forward, _MARK, True)
    return _model_forward


def hook(runner_class: Any) -> None:
    """Wrap `runner_class._model_forward`; a second call changes nothing."""
    if not hasattr(runner_class._model_forward, _MARK):
        runner_class._model_forward = with_plan(runner_class._model_forward)


def unhooked(runner_class: Any) -> Iterator[Any]:
    """The runner classes of this process that would run the model without a plan."""
    if not hasattr(runner_class._model_forward, _MARK):
        yield runner_class
    for subclass in runner_class.__subclasses__():
        yield from unhooked(subclass)
