"""Model Runner V2: each forward's plan as one more model input, from the model's own state.

vllm/v1/worker/gpu/model_states: a model may bring a `ModelState`; what its `prepare_inputs` returns
is passed to the model's forward. A step that vLLM replays from a full CUDA graph never calls it.
"""

import time
from dataclasses import dataclass
from typing import Any

from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from orthorank_vllm.engine.batches import RequestFacts, batch_of_v2, shadow_step_of_v2
from orthorank_vllm.engine.step_stats import Seconds
from orthorank_vllm.selection.plan import Batch, Plan


@dataclass(frozen=True)
class _Running:
    """A step with prompt tokens; `started`, `planned`: when its plan was begun and ready."""

    batch: Batch
    plan: Plan | None
    started: float
    planned: float


class OrthoRankModelState(DefaultModelState):
    """vLLM's own state, and the plan of each step."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self._orthorank = model.orthorank
        self._lora_manager = getattr(model, "lora_manager", None)
        self._orthorank.needs_model_state = False
        self._facts = RequestFacts(self.max_num_reqs)
        self._is_replayed = False
        self._running: _Running | None = None

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self._facts.add(req_index, new_req_data, self._orthorank.config)

    def prepare_attn(self, input_batch: Any, cudagraph_mode: Any, *args: Any, **kwargs: Any) -> Any:
        # Called before `prepare_inputs`, which is not told the mode.
        self._is_replayed = cudagraph_mode == CUDAGraphMode.FULL
        return super().prepare_attn(input_batch, cudagraph_mode, *args, **kwargs)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        self._running = None
        started = time.perf_counter()
        batch = batch_of_v2(input_batch, req_states, self._facts, self._lora_manager)
        if batch is None:
            return inputs
        # Steps as long as decoding's are replayed whoever is in them (prompts of one token, or
        # in 0.26 as short as what speculation verifies): those are dense.
        plan = None if self._is_replayed else self._orthorank.plan(batch)
        self._running = _Running(batch, plan, started, time.perf_counter())
        if self._orthorank.shadow_rows is not None and not self._is_replayed:
            self._orthorank.shadow_rows.expect(shadow_step_of_v2(input_batch, batch, self._facts))
        return inputs if plan is None else {**inputs, "orthorank_plan": plan}

    def postprocess_state(self, *args: Any, **kwargs: Any) -> None:
        # Once the model has run.
        super().postprocess_state(*args, **kwargs)
        if self._running is not None:
            running, self._running = self._running, None
            seconds = Seconds(
                plan=running.planned - running.started,
                forward=time.perf_counter() - running.planned,
            )
            self._orthorank.count(running.batch, running.plan, seconds)
