"""What a ratio could gain at most: counted from the model's shapes."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from orthorank_vllm.options import DEFAULT_KEEP, DEFAULT_WINDOW
from orthorank_vllm.plan import Batch, make_plan


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model like Llama.

    Attributes:
        intermediate: of one expert, where there are experts.
        experts, experts_per_token: 1 and 1 for a dense MLP.
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

    @classmethod
    def of(cls, config: Any) -> "Shapes":
        """
        Args:
            config: the model's Hugging Face configuration.
        """
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            experts=getattr(config, "num_local_experts", None) or 1,
            experts_per_token=getattr(config, "num_experts_per_tok", None) or 1,
        )

    def without(self, layers: int) -> "Shapes":
        """The same model, pruned."""
        return replace(self, layers=self.layers - layers)

    def prefill(
        self,
        tokens: int,
        selective: int = 0,
        keep: float = DEFAULT_KEEP,
        window: int = DEFAULT_WINDOW,
        is_read_whole: bool = False,
    ) -> float:
        """Floating-point operations of one prompt; norms and the like are left out.

        Args:
            selective: how many layers are; with any, the last layer (taken to be a
                dense one) computes only what is read.
            is_read_whole: see `plan.Batch`.
        """
        head = 2.0 * self.hidden * self.vocabulary
        if not selective:
            return self.layers * self._layer(tokens, tokens) + head
        last = self._layer(tokens, tokens if is_read_whole else 1)
        dense = (self.layers - selective - 1) * self._layer(tokens, tokens)
        return dense + selective * self._layer(tokens, _updated(tokens, keep, window)) + last + head

    def _layer(self, tokens: int, updated: int) -> float:
        head_rows = self.heads * self.head_size
        key_value = 2.0 * self.hidden * 2 * self.kv_heads * self.head_size
        query_and_output = 2.0 * self.hidden * head_rows * 2
        mlp = 2.0 * self.hidden * self.intermediate * 3 * self.experts_per_token
        router = 2.0 * self.hidden * self.experts if self.experts > 1 else 0.0
        # A query sees half of the prompt on average.
        attention = 4.0 * head_rows * (tokens + 1) / 2
        return tokens * key_value + updated * (query_and_output + mlp + router + attention)


def _updated(tokens: int, keep: float, window: int) -> int:
    one = np.ones(1, dtype=np.int64)
    plan = make_plan(Batch(0 * one, tokens * one, tokens * one, 0 * one), keep, window)
    return tokens if plan is None else plan.num_selected


def load_gain(prefill_share: float, prefill_gain: float) -> float:
    """The gain of a whole of which only the prefill gains (Amdahl)."""
    return 1 / (1 - prefill_share + prefill_share / prefill_gain)
