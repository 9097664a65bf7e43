"""The architectures that vLLM loads: stock models that know which weights they were given.

Those that serve take a plan in their forward. `*ForCausalLM.forward` is plain Python around the
compiled model (vllm/model_executor/models/llama.py), so the choice of the path is made here.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models import ModelRegistry
from vllm.sequence import IntermediateTensors

from orthorank_vllm.engine.adapters import adapters_of_step, no_adapters
from orthorank_vllm.engine.drafts import final_states
from orthorank_vllm.engine.prefill import SparsePrefill
from orthorank_vllm.model.adapters import base_logits
from orthorank_vllm.model.architectures import MEASURED_OF, ORTHORANK_OF
from orthorank_vllm.model.fingerprint import Fingerprint
from orthorank_vllm.selection.plan import Plan


class MeasuredForCausalLM:
    """Put before a stock class: that one, and a fingerprint of its weights."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        self.fingerprint = Fingerprint()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        stock: Any = super()
        loaded: set[str] = stock.load_weights(self.fingerprint.noting(weights))
        return loaded


class OrthoRankForCausalLM(MeasuredForCausalLM):
    """Put before a stock class: without a plan that one's forward, with one the sparse one."""

    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self.orthorank = SparsePrefill(vllm_config, self.model)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        orthorank_plan: Plan | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]] | IntermediateTensors:
        self.orthorank.has_run = True
        if self.orthorank.needs_warm_up:
            # vLLM runs the model at start-up, with and without a KV cache.
            self.orthorank.warm_up()
        if orthorank_plan is None:
            if self.orthorank.needs_profile_run and get_forward_context().attn_metadata is None:
                adapters = no_adapters(self, len(positions), positions.device)
                self.orthorank.profile_run(input_ids, positions, adapters, inputs_embeds)
            stock: Any = super()
            output = stock.forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        else:
            adapters = adapters_of_step(self, orthorank_plan)
            output = self.orthorank.forward(
                orthorank_plan,
                input_ids,
                positions,
                intermediate_tensors,
                adapters,
                inputs_embeds,
            )
        if self.orthorank.shadow_rows is not None:
            self.orthorank.shadow_rows.see(final_states(output), partial(base_logits, self))
        return output

    @staticmethod
    def get_model_state_cls() -> type:
        """The class that Model Runner V2 asks for (vllm/v1/worker/gpu/model_states/__init__.py)."""
        # Its modules need Triton with a backend for the device, which most CPUs lack.
        from orthorank_vllm.engine.runner_v2 import OrthoRankModelState

        return OrthoRankModelState

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = super().load_weights(weights)
        self.orthorank.weights_changed(self.fingerprint)
        return loaded


def class_of(name: str) -> type:
    """Our version of an architecture, made of vLLM's own class of it.

    Args:
        name: one of `ORTHORANK_OF`'s or `MEASURED_OF`'s values.
    """
    names: dict[str, str] = ORTHORANK_OF
    ours: type = OrthoRankForCausalLM
    if name not in names.values():
        names, ours = MEASURED_OF, MeasuredForCausalLM
    architecture = next(stock for stock, version in names.items() if version == name)
    stock_class = ModelRegistry.models[architecture].load_model_cls()
    return type(name, (ours, stock_class), {"__module__": __name__})
