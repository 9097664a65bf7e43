"""The architectures that vLLM loads: stock models whose forward may take a plan.

`*ForCausalLM.forward` is plain Python around the compiled model
(vllm/model_executor/models/llama.py), so the choice of the path is made here.
"""

from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.sequence import IntermediateTensors

from orthorank_vllm.engine.runtime import OrthoRank
from orthorank_vllm.plan import Plan


class OrthoRankLlamaForCausalLM(LlamaForCausalLM):
    """Without a plan stock vLLM, compiled; with one the sparse forward."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self.orthorank = OrthoRank(vllm_config)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        orthorank_plan: Plan | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if orthorank_plan is None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        assert input_ids is not None
        return self.orthorank.forward(self.model, orthorank_plan, input_ids, positions)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = super().load_weights(weights)
        self.orthorank.weights_changed(self.model)
        return loaded
