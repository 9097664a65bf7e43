"""Model Runner V1: make each forward's plan and hand it to the model.

vllm/v1/worker/gpu_model_runner.py: `_model_forward` is called by `execute_model`
alone, never by warm-up, and is documented as the place to override.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context

from orthorank_vllm.engine.batches import batch_of_v1, shadow_step_of_v1
from orthorank_vllm.engine.step_stats import Seconds

_MARK = "_orthorank_hook"


def with_plan(model_forward: Callable[..., Any]) -> Callable[..., Any]:
    """`_model_forward`, with the plan as one more model input where one is needed."""

    @functools.wraps(model_forward)
    def _model_forward(self: Any, *args: Any, **model_kwargs: Any) -> Any:
        orthorank = getattr(self.get_model(), "orthorank", None)
        if orthorank is None:
            return model_forward(self, *args, **model_kwargs)
        started = time.perf_counter()
        batch = batch_of_v1(self, orthorank.config)
        # A step that is replayed from a full CUDA graph does not run the model: steps as long as
        # decoding's, prompts of one token among them. Those are dense.
        is_replayed = get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.FULL
        plan = None if batch is None or is_replayed else orthorank.plan(batch)
        planned = time.perf_counter()
        if batch is not None and not is_replayed and orthorank.shadow_rows is not None:
            orthorank.shadow_rows.expect(shadow_step_of_v1(self, batch, orthorank.config))
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
