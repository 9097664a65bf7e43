"""One thing that was looked at, and how it is told."""

from collections.abc import Iterable
from dataclasses import dataclass

OK = "ok"
WARNING = "warning"
FAILED = "FAILED"


@dataclass(frozen=True)
class Check:
    """What was looked at, and what was found.

    Attributes:
        what: was looked at.
        state: OK, WARNING or FAILED.
        found: in one line.
        mend: what to do about it; empty where all is well.
    """

    what: str
    state: str
    found: str
    mend: str = ""


def ok(what: str, found: str) -> Check:
    """A check with nothing to mend."""
    return Check(what, OK, found)


def warning(what: str, found: str, mend: str) -> Check:
    """A check of what works, but not as well as it could or as was asked for."""
    return Check(what, WARNING, found, mend)


def failed(what: str, found: str, mend: str) -> Check:
    """A check of what keeps OrthoRank from running."""
    return Check(what, FAILED, found, mend)


def lines_of(checks: Iterable[Check]) -> list[str]:
    """Checks for people: one line for each."""
    checks = list(checks)
    width = max(len(check.what) for check in checks)
    return [
        f"{check.state:<8} {check.what:<{width}}  {check.found}"
        + (f". {check.mend}" if check.mend else "")
        for check in checks
    ]
