"""Pairs of times: what counts as a difference."""

import math
import random
import statistics
from functools import partial

import pytest

from orthorank_vllm.bench.paired_stats import (
    Round,
    Spread,
    measure_rounds,
    noise,
    ratios,
    same_server_ratios,
)


def test_every_second_round_runs_backwards() -> None:
    asked: list[tuple[str, int]] = []

    def measure(name: str, number: int) -> float:
        asked.append((name, number))
        return 1.0

    rounds = measure_rounds([(name, partial(measure, name)) for name in "abc"], 3)
    assert [name for name, _ in asked] == list("abccbaabc")
    assert [number for _, number in asked] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [list(seconds) for seconds in rounds] == [list("abc"), list("cba"), list("abc")]


def test_a_server_is_compared_with_itself_where_it_was_measured_twice_in_a_row() -> None:
    rounds: list[Round] = [{"a": 1.0, "b": 4.0}, {"b": 2.0, "a": 3.0}, {"a": 6.0, "b": 1.0}]
    assert same_server_ratios(rounds) == [2.0, 0.5]
    assert ratios(rounds, rival="a", ours="b") == [0.25, 1.5, 6.0]


@pytest.mark.parametrize(("count", "outside"), [(6, 0), (8, 0), (9, 1), (12, 2), (20, 5), (50, 17)])
def test_the_interval_leaves_out_what_the_table_of_the_sign_test_says(
    count: int, outside: int
) -> None:
    """The table: Conover, Practical Nonparametric Statistics, two-sided 5 %."""
    values = [float(value) for value in range(count)]
    spread = Spread.of(random.Random(0).sample(values, count))
    assert (spread.low, spread.high) == (outside, count - 1 - outside)
    assert spread.median == statistics.median(values)


def test_too_few_pairs_are_no_evidence() -> None:
    spread = Spread.of([2.0] * 5)
    assert math.isnan(spread.low)
    assert spread.verdict(noise=1.0) == "within noise"


def test_the_interval_holds_the_median_in_about_95_of_100_cases() -> None:
    numbers = random.Random(0)
    hits = 0
    for _ in range(2000):
        spread = Spread.of([numbers.lognormvariate(0.2, 0.3) for _ in range(12)])
        hits += spread.low <= math.exp(0.2) <= spread.high
    assert 0.95 <= hits / 2000 <= 0.975  # 12 values: 96.1 %


def test_a_difference_counts_only_beyond_what_a_server_differs_from_itself() -> None:
    def rounds(gain: float, wobble: float) -> list[Round]:
        found: list[Round] = []
        for number in range(12):
            seconds = {"stock": gain, "orthorank": 1.0}
            if number % 2:
                seconds = dict(reversed(seconds.items()))
            # Slower from round to round: a drift that pairs do not see, and repeats do.
            found.append({name: value * wobble**number for name, value in seconds.items()})
        return found

    def verdict(gain: float, wobble: float) -> str:
        found = rounds(gain, wobble)
        return Spread.of(ratios(found, "stock", "orthorank")).verdict(noise(found))

    assert verdict(gain=1.1, wobble=1.01) == "gain"
    assert verdict(gain=1.1, wobble=1.2) == "within noise"
    assert verdict(gain=0.9, wobble=1.01) == "loss"
    assert verdict(gain=1.0, wobble=1.0) == "within noise"
