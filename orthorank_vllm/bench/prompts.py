"""Prompts of an exact length that no prefix cache has seen."""

import random
from collections.abc import Sequence

from orthorank_vllm.options import OptionError

# vLLM's smallest usual cache block: prompts that differ in it share no cached prefix.
HEAD = 16

Prompt = list[int]


class Prompts:
    """Random stretches of one text, no two of which begin in the same way."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._random = random.Random(0)
        self._heads: set[tuple[int, ...]] = set()

    def draw(self, length: int) -> Prompt:
        """
        Raises:
            OptionError: the text does not hold another stretch of this length.
        """
        for _ in range(1000 if len(self._tokens) >= length else 0):
            start = self._random.randrange(len(self._tokens) - length + 1)
            stretch = list(self._tokens[start : start + length])
            head = tuple(stretch[:HEAD])
            if head not in self._heads:
                self._heads.add(head)
                return stretch
        raise OptionError(
            f"--data: the text has {len(self._tokens)} tokens, too few for this many different "
            f"prompts of {length}; give a longer one"
        )
