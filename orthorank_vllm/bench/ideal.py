"""What a ratio could gain at most: counted from the model's shapes."""

import numpy as np

from orthorank_vllm.flops import Shapes
from orthorank_vllm.options import DEFAULT_KEEP, DEFAULT_WINDOW
from orthorank_vllm.selection.plan import Batch, make_plan


def prefill(
    shapes: Shapes,
    tokens: int,
    selective: int = 0,
    keep: float = DEFAULT_KEEP,
    window: int = DEFAULT_WINDOW,
    wants_all_rows: bool = False,
) -> float:
    """Floating-point operations of one prompt.

    Args:
        selective: how many layers are; with any, the last layer (taken to be a
            dense one) computes only what is read.
        wants_all_rows: see `plan.Batch`.
    """
    if not selective:
        return shapes.layers * _layer(shapes, tokens, tokens) + shapes.head
    last = _layer(shapes, tokens, tokens if wants_all_rows else 1)
    dense = (shapes.layers - selective - 1) * _layer(shapes, tokens, tokens)
    sparse = selective * _layer(shapes, tokens, _updated(tokens, keep, window))
    return dense + sparse + last + shapes.head


def _layer(shapes: Shapes, tokens: int, updated: int) -> float:
    # A query sees half of the prompt on average.
    return tokens * shapes.key_and_value + updated * shapes.update((tokens + 1) / 2)


def _updated(tokens: int, keep: float, window: int) -> int:
    one = np.ones(1, dtype=np.int64)
    plan = make_plan(Batch(0 * one, tokens * one, tokens * one, 0 * one), keep, window)
    return tokens if plan is None else plan.num_selected


def load_gain(prefill_share: float, prefill_gain: float) -> float:
    """The gain of a whole of which only the prefill gains (Amdahl)."""
    return 1 / (1 - prefill_share + prefill_share / prefill_gain)
