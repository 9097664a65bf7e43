"""How many updates of a prompt are skipped, by arithmetic alone."""

import math


def skipped_of(length: int, keep: float, tail: int = 64, window: int = 128) -> int:
    """Tokens of a prompt that is computed in one forward which one selective layer passes over.

    Position 0 and the tail do not compete; of each window of the others a share is kept.
    """
    competing = [
        range(max(start, 1), min(start + window, length - tail))
        for start in range(0, length, window)
    ]
    return sum(len(part) - math.ceil(keep * len(part) - 1e-9) for part in competing)
