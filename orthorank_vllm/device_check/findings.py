"""What the parts of the check hand back, and the table that is made of it."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """Something that must hold.

    Attributes:
        measured: how far it is from that.
        allowed: how far it may be; None: it is told only.
    """

    what: str
    measured: float
    allowed: float | None = None

    @property
    def holds(self) -> bool:
        # NaN is no agreement.
        return self.allowed is None or self.measured <= self.allowed


@dataclass(frozen=True)
class Speed:
    """Seconds of the same work, by who did it, one after another.

    Attributes:
        tokens: computed by each measurement.
        seconds: of each round.
    """

    work: str
    tokens: int
    seconds: dict[str, list[float]]

    def rate(self, name: str) -> float:
        """Tokens per second, by the median."""
        return self.tokens / statistics.median(self.seconds[name])

    def gain(self, name: str, stock: str) -> float:
        """How many times as fast, by the median of the rounds' ratios."""
        pairs = zip(self.seconds[stock], self.seconds[name], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def table(
    findings: Mapping[str, Sequence[Finding]], speeds: Sequence[Speed], failures: Mapping[str, str]
) -> str:
    """For the terminal.

    Args:
        findings: by part.
        failures: parts that came to no end, and why.
    """
    lines = ["| part | what | measured | allowed | |", "|---|---|---|---|---|"]
    for part, found in findings.items():
        lines += [_finding_row(part, finding) for finding in found]
    lines += [f"| {part} | {reason} | | | **FAILED** |" for part, reason in failures.items()]
    if speeds:
        names = list(speeds[0].seconds)
        stock, *others = names
        heads = [f"{name}, times {stock}" for name in others]
        lines += ["", _row("tokens per second", *names, *heads), "|---" * (2 * len(names)) + "|"]
        for speed in speeds:
            rates = [f"{speed.rate(name):,.0f}" for name in names]
            gains = [f"{speed.gain(name, stock):.3f}" for name in others]
            lines.append(_row(speed.work, *rates, *gains))
    return "\n".join(lines)


def all_hold(findings: Mapping[str, Sequence[Finding]], failures: Mapping[str, str]) -> bool:
    return not failures and all(f.holds for found in findings.values() for f in found)


def findings_of(values: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """From JSON."""
    return [Finding(**value) for value in values]


def _finding_row(part: str, finding: Finding) -> str:
    allowed = "" if finding.allowed is None else f"{finding.allowed:.2g}"
    verdict = "told" if finding.allowed is None else "ok" if finding.holds else "**FAILED**"
    return _row(part, finding.what, f"{finding.measured:.2g}", allowed, verdict)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
