"""The check's table and its verdict."""

import math

import pytest

from orthorank_vllm.device_check.findings import Finding, Speed, all_hold, findings_of, table

FINDINGS = {
    "kernel": [Finding("one prompt", 7e-7, 2e-6), Finding("pages", 0.5, 2e-6)],
    "llama": [Finding("told", 0.25)],
}
SPEED = Speed("prefill", 1000, {"stock": [1.0, 2.0, 4.0], "gather": [0.5, 2.0, 1.0]})


def test_the_table_has_every_finding_its_verdict_and_the_speeds_last() -> None:
    lines = table(FINDINGS, [SPEED], {"speed": "out of memory; see log"}).splitlines()
    assert lines[2:6] == [
        "| kernel | one prompt | 7e-07 | 2e-06 | ok |",
        "| kernel | pages | 0.5 | 2e-06 | **FAILED** |",
        "| llama | told | 0.25 |  | told |",
        "| speed | out of memory; see log | | | **FAILED** |",
    ]
    assert lines[-3:] == [
        "| tokens per second | stock | gather | gather, times stock |",
        "|---|---|---|---|",
        # Medians: 2 s and 1 s; of 2, 1 and 4 times as fast.
        "| prefill | 500 | 1,000 | 2.000 |",
    ]


def test_without_speeds_there_is_no_second_table() -> None:
    assert "tokens per second" not in table(FINDINGS, [], {})


@pytest.mark.parametrize(
    ("measured", "allowed", "holds"),
    [(1.0, 1.0, True), (1.1, 1.0, False), (math.nan, 1.0, False), (math.inf, None, True)],
)
def test_a_finding_holds_within_what_is_allowed(
    measured: float, allowed: float | None, holds: bool
) -> None:
    """Break seen: NaN taken for agreement."""
    finding = Finding("what", measured, allowed)
    assert finding.holds == holds
    assert all_hold({"part": [finding]}, {}) == holds


def test_a_part_without_an_answer_is_a_failure() -> None:
    assert not all_hold({}, {"speed": "out of memory"})


def test_findings_survive_json() -> None:
    found = [{"what": "a", "measured": 1.0, "allowed": None}]
    assert findings_of(found) == [Finding("a", 1.0)]
