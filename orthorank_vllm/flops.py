"""Floating-point operations of a model, a prompt, a plan, counted from the model's sizes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from orthorank_vllm.options import DEFAULT_TAIL, DEFAULT_WINDOW
from orthorank_vllm.selection.plan import Batch, Plan, make_plan
from orthorank_vllm.selection.quotas import Quota


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model like Llama. Norms and the like count as nothing.

    Attributes:
        intermediate: of one expert, where there are experts.
        experts, experts_per_token: 1 and 1 for a dense MLP.
        shared_intermediate: of an expert that every token meets, where there is one.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    experts: int = 1
    experts_per_token: int = 1
    shared_intermediate: int = 0

    @classmethod
    def of(cls, config: Any) -> "Shapes":
        """The shapes in a model's configuration.

        Args:
            config: the model's Hugging Face configuration.
        """

        def value(name: str) -> int:
            return getattr(config, name, None) or 0

        experts = value("num_local_experts") or value("num_experts") or 1
        of_expert = value("moe_intermediate_size") if experts > 1 else 0
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=value("num_key_value_heads") or config.num_attention_heads,
            head_size=value("head_dim") or config.hidden_size // config.num_attention_heads,
            intermediate=of_expert or config.intermediate_size,
            vocabulary=config.vocab_size,
            experts=experts,
            experts_per_token=value("num_experts_per_tok") or 1 if experts > 1 else 1,
            shared_intermediate=value("shared_expert_intermediate_size"),
        )

    def without(self, layers: int) -> "Shapes":
        """What is left of the model once so many layers are pruned."""
        return replace(self, layers=self.layers - layers)

    @property
    def key_and_value(self) -> float:
        """Operations of one token's K and V in a layer, which every token costs."""
        return 2.0 * self.hidden * 2 * self.kv_heads * self.head_size

    def update(self, keys: float) -> float:
        """Operations of the rest of a layer for one token, which a skipped update saves.

        Args:
            keys: how many its query sees.
        """
        head_rows = self.heads * self.head_size
        query_and_output = 2.0 * self.hidden * head_rows * 2
        of_mlp = self.intermediate * self.experts_per_token + self.shared_intermediate
        mlp = 2.0 * self.hidden * of_mlp * 3
        router = 2.0 * self.hidden * self.experts if self.experts > 1 else 0.0
        return query_and_output + mlp + router + 4.0 * head_rows * keys

    def stand_in(self, rank: int) -> float:
        """Operations of a linear map of low rank for one token."""
        return 4.0 * self.hidden * rank

    @property
    def head(self) -> float:
        """Operations of the logits of one token."""
        return 2.0 * self.hidden * self.vocabulary


def prefill_flops(
    shapes: Shapes,
    tokens: int,
    layers: Mapping[int, float] = MappingProxyType({}),
    window: int = DEFAULT_WINDOW,
    tail: int = DEFAULT_TAIL,
) -> float:
    """Floating-point operations of one prompt, and of the logits of its last token.

    Args:
        layers: the selective ones, and the keep of each.
    """
    # A query sees half of the prompt on average.
    layer = tokens * (shapes.key_and_value + shapes.update((tokens + 1) / 2))
    dense = shapes.layers * layer + shapes.head
    zero = np.zeros(1, dtype=np.int64)
    batch = Batch(zero, zero + tokens, zero + tokens, zero)
    plan = make_plan(batch, layers.values(), window, tail)
    if plan is None or not layers:
        return dense
    quotas = dict(zip(layers, plan.quotas, strict=True))
    return dense - flops_saved(plan, shapes, quotas, shapes.layers - 1)


def flops_saved(
    plan: Plan,
    shapes: Shapes,
    quotas: Mapping[int, Quota | None],
    last_layer: int | None,
    stand_in_rank: int = 0,
) -> float:
    """Floating-point operations that a forward with this plan does not make.

    An estimate: a skipped token is taken to stand in the middle of its request's part, and all
    that its layer computes for it, K and V apart, to be left out.

    Args:
        quotas: of the plan's, those of the selective layers that run it.
        last_layer: the model's, which computes only what is read, if it runs it.
        stand_in_rank: of all layers' stand-ins together, whose own work is none saved.
    """
    batch = plan.batch
    computes_few = last_layer is not None and plan.sampled_rows is not None
    skipped = np.zeros_like(batch.query_len)
    for layer, quota in quotas.items():
        if quota is not None and not (computes_few and layer == last_layer):
            skipped = skipped + batch.query_len - quota.selected_per_request
    if computes_few:
        skipped = skipped + batch.query_len - plan.sampled_per_request
    keys = batch.num_computed + (batch.prompt_tokens + 1) / 2
    total = float(skipped.sum())
    if not total:
        return 0.0
    saved = total * shapes.update(float((skipped * keys).sum()) / total)
    return saved - plan.num_tokens * shapes.stand_in(stand_in_rank)
