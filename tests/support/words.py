"""Random tokens to prompt small random models with."""

import random


class Words:
    """Random tokens, the same in every run."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)

    def take(self, length: int) -> list[int]:
        return [self._draw.randrange(5, 500) for _ in range(length)]
