"""Perplexity of a whole text, in segments of one length, as papers give it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from orthorank_vllm.calibrate.text import Text
from orthorank_vllm.evaluate.scorer import Scorer
from orthorank_vllm.options import OptionError


def cut(text: Text, tokens: Sequence[int], length: int) -> list[list[int]]:
    """Consecutive segments; a rest that does not fill one is left out, as in the paper.

    Raises:
        OptionError: the text does not fill one.
    """
    count = len(tokens) // length
    if not count:
        raise OptionError(
            f"--data {text.name}: it is too short, it has {len(tokens)} tokens and --length is "
            f"{length}"
        )
    return [list(tokens[index * length : (index + 1) * length]) for index in range(count)]


def perplexity(
    scorer: Scorer,
    segments: Sequence[Sequence[int]],
    on_texts: Callable[[int], Any] = lambda count: None,
) -> float:
    """Of every token but each segment's first, which has nothing before it."""
    scores = scorer(segments, [1] * len(segments), on_texts)
    scored = sum(len(segment) - 1 for segment in segments)
    return math.exp(-sum(score.log_prob for score in scores) / scored)
