"""Log-probabilities of many texts, and of a whole one its perplexity, as papers give it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orthorank_vllm.calibrate.text import Text
from orthorank_vllm.offline import worker_calls
from orthorank_vllm.offline.texts import TextScore, packed
from orthorank_vllm.offline.workers import Workers
from orthorank_vllm.options import OptionError
from orthorank_vllm.selection.method import Method

# In one forward: enough to keep the processor busy, little enough to stay small.
TOKENS_PER_FORWARD = 2048


@dataclass(frozen=True)
class Scorer:
    """A loaded model with a method of some layers.

    Attributes:
        chosen: the keep of each chosen layer.
        is_served: what is scored is an answer, and dense; else prompt.
        on_texts: called after each forward with the number of its texts.
    """

    workers: Workers
    chosen: Mapping[int, float]
    method: Method
    is_served: bool
    on_texts: Callable[[int], Any]

    def __call__(
        self, texts: Sequence[Sequence[int]], first_scored: Sequence[int]
    ) -> list[TextScore]:
        """Score each text's tokens from a position on.

        Texts of like length go together: a forward pads them to its longest.

        Args:
            texts: token ids, at least two in each.
            first_scored: position of the first scored token of each, at least 1.
        """
        scores: dict[int, TextScore] = {}
        for indices in _forwards([len(text) for text in texts]):
            answers = self.workers.call(
                worker_calls.score_texts,
                [texts[index] for index in indices],
                [first_scored[index] for index in indices],
                self.chosen,
                self.method,
                self.is_served,
            )
            scores |= zip(indices, answers, strict=True)
            self.on_texts(len(indices))
        return [scores[index] for index in range(len(texts))]


def _forwards(lengths: Sequence[int]) -> list[list[int]]:
    by_length = sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True)
    forwards = packed((lengths[index] for index in by_length), TOKENS_PER_FORWARD)
    return [[by_length[place] for place in places] for places in forwards]


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


def perplexity(scorer: Scorer, segments: Sequence[Sequence[int]]) -> float:
    """Perplexity of every token but each segment's first, which has nothing before it."""
    scores = scorer(segments, [1] * len(segments))
    scored = sum(len(segment) - 1 for segment in segments)
    return math.exp(-sum(score.log_prob for score in scores) / scored)
