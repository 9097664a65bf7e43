"""What each forward did, counted on the host, without waiting for the device."""

from typing import Any, NamedTuple

import numpy as np

from orthorank_vllm.flops import Shapes, flops_saved
from orthorank_vllm.metrics import definitions
from orthorank_vllm.metrics.recorder import WorkerMetrics, labels_of
from orthorank_vllm.model.decoder import Decoder
from orthorank_vllm.model.forward import Outcome
from orthorank_vllm.selection.plan import Batch, Plan


class Seconds(NamedTuple):
    """What a step took on the host.

    Attributes:
        plan: from the runner's numbers to the plan.
        forward: the model's forward.
    """

    plan: float
    forward: float


class StepCounter:
    """Counts the steps of one worker."""

    def __init__(
        self, metrics: WorkerMetrics, shapes: Shapes, is_first_stage: bool, last_layer: int | None
    ) -> None:
        """Count for one stage of the model.

        Args:
            is_first_stage: whether steps, prompt tokens and sinks are counted here.
            last_layer: the model's, if it is in this stage.
        """
        self.metrics = metrics
        self._shapes = shapes
        self._is_first_stage = is_first_stage
        self._last_layer = last_layer

    @classmethod
    def of(cls, vllm_config: Any, decoder: Decoder) -> "StepCounter":
        return cls(
            WorkerMetrics(labels_of(vllm_config), decoder.layers),
            Shapes.of(vllm_config.model_config.hf_text_config),
            decoder.is_first,
            decoder.last_layer if decoder.is_last else None,
        )

    def count(
        self,
        batch: Batch | None,
        plan: Plan | None,
        outcome: Outcome | None,
        seconds: Seconds,
    ) -> None:
        """Count one step, after its forward.

        Args:
            batch: None in a step without prompt tokens.
            plan, outcome: None in a stock step.
        """
        path = definitions.STOCK if outcome is None else definitions.SPARSE
        if self._is_first_stage:
            self.metrics.count_step(path, seconds.forward)
        if batch is None:
            return
        prompt_tokens = int(batch.prompt_tokens.sum())
        if self._is_first_stage:
            if batch.num_selective is not None:
                self.metrics.count_ratios(
                    np.bincount(batch.num_selective, batch.prompt_tokens).astype(int).tolist()
                )
            self.metrics.count_prefill_step(path, prompt_tokens, seconds.forward, seconds.plan)
        if plan is None or outcome is None:
            self.metrics.count_updates(prompt_tokens, {})
            return
        is_first = self._is_first_stage
        self.metrics.count_saved(
            flops_saved(
                plan, self._shapes, outcome.quotas, self._last_layer, outcome.stand_in_rank
            ),
            outcome.sink_hits if is_first else 0,
            outcome.sink_misses if is_first else 0,
        )
        skipped = {
            layer: plan.num_tokens - quota.num_selected for layer, quota in outcome.quotas.items()
        }
        self.metrics.count_updates(prompt_tokens, skipped)
