"""How the times of two servers compare: pair by pair, and against what chance alone does.

Servers are measured in rounds, each in turn, and every second round runs backwards. So
every server is also measured twice in a row, which shows how far one and the same
server differs from itself: the noise.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# With fewer than six ratios no two of them enclose their median with 95 %, and a server meets
# itself once less than it meets another.
LEAST_PAIRS = 7
CONFIDENCE = 0.95

Round = dict[str, float]
"""Seconds by server, in the order of measuring."""


@dataclass(frozen=True)
class Spread:
    """Ratios of paired times.

    Attributes:
        low, high: enclose the true median with 95 % confidence, whatever the
            distribution; not a number where there are too few ratios.
    """

    median: float
    low: float
    high: float
    low_quartile: float
    high_quartile: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> "Spread":
        """The median of some ratios, with its interval and the quartiles.

        Args:
            ratios: at least two.
        """
        ordered = sorted(ratios)
        low_quartile, median, high_quartile = statistics.quantiles(ordered, n=4, method="inclusive")
        outside = _outside(len(ordered))
        if outside is None:
            return cls(median, math.nan, math.nan, low_quartile, high_quartile)
        return cls(median, ordered[outside], ordered[-1 - outside], low_quartile, high_quartile)

    def verdict(self, noise: float) -> str:
        """A difference counts if all of the interval lies beyond the noise.

        Args:
            noise: see `noise`.
        """
        if self.low > noise:
            return "gain"
        return "loss" if self.high < 1 / noise else "within noise"


def measure_rounds(
    measures: Sequence[tuple[str, Callable[[int], float]]],
    rounds: int,
    on_measure: Callable[[], object] = lambda: None,
) -> list[Round]:
    """Measure every server in each round, in every second one backwards.

    Args:
        measures: name of each server, and what times it in a round, in seconds.
    """
    found: list[Round] = []
    for number in range(rounds):
        seconds: Round = {}
        for name, measure in measures if number % 2 == 0 else reversed(measures):
            seconds[name] = measure(number)
            on_measure()
        found.append(seconds)
    return found


def ratios(rounds: Sequence[Round], rival: str, ours: str) -> list[float]:
    """The rival's time divided by ours, round by round: above 1 ours is faster."""
    return [seconds[rival] / seconds[ours] for seconds in rounds]


def same_server_ratios(rounds: Sequence[Round]) -> list[float]:
    """One server's time divided by its own next one, where no other came between."""
    found = []
    for earlier, later in itertools.pairwise(rounds):
        name = list(earlier)[-1]
        assert name == next(iter(later))
        found.append(earlier[name] / later[name])
    return found


def noise(rounds: Sequence[Round]) -> float:
    """How far from 1 the median of as many ratios of a server to itself can be, as a factor.

    Infinite if there are too few to say.
    """
    spread = Spread.of(same_server_ratios(rounds))
    if math.isnan(spread.low):
        return math.inf
    return max(1 / spread.low, spread.high)


def _outside(count: int) -> int | None:
    """How many of `count` ordered values to leave out at either end.

    The median lies below the k-th value with the probability that fewer than k of
    `count` tosses of a coin are heads.
    """
    tail, outside = 0.0, None
    for heads in range(count // 2):
        tail += math.comb(count, heads) / 2**count
        if tail > (1 - CONFIDENCE) / 2:
            break
        outside = heads
    return outside
