"""What the user may ask for, by flag or by key, and the one line that answers what he may not."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

DEFAULT_KEEP = 1 / 3
DEFAULT_WINDOW = 128
DEFAULT_CALIBRATE_SECONDS = 60.0
# What `attention` may be: ways for a sparse set of queries, see the package of that name.
ATTENTION_BACKENDS = ("auto", "gather", "triton", "cpu")
OPTION_NAMES = ("ratio", "keep", "window", "layers", "profile", "calibrate_seconds", "attention")
# Positions are counted in 32 bits on the way.
MOST_WINDOW = 2**31 - 1


class OptionError(ValueError):
    """A user's mistake, told in one line: the option, the value and what is allowed."""


def checked_mapping(given: object) -> Mapping[str, Any]:
    """What `additional_config["orthorank"]` has to be; its keys and values are not looked at.

    Raises:
        OptionError: it is something else.
    """
    if not isinstance(given, Mapping):
        raise OptionError(
            f'additional_config["orthorank"] = {" ".join(repr(given).split())}: not allowed, '
            f"give a dictionary with keys from {', '.join(OPTION_NAMES)}"
        )
    return given


def flag_of(name: str) -> str:
    """The flag of `vllm serve` for an option's name offline."""
    return f"--orthorank-{name.replace('_', '-')}"


def rejected(name: str, value: object, allowed: str) -> OptionError:
    """The error for one option by its name offline."""
    # A value may have lines of its own.
    return OptionError(f"{flag_of(name)} {' '.join(str(value).split())}: not allowed, {allowed}")


def parse_ratio(value: object) -> float:
    """Fraction of token-layer updates that prefill skips; 0 is stock vLLM."""
    number = _parse_number(value)
    if number is None or not 0 <= number < 1:
        raise rejected("ratio", value, "give a number from 0 (off) to below 1")
    return number


def parse_keep(value: object) -> float:
    """Fraction of the tokens that a selective layer updates."""
    number = _parse_number(value)
    if number is None or not 0 < number < 1:
        raise rejected("keep", value, "give a number above 0 and below 1")
    return number


def parse_window(value: object) -> int:
    """Prompt positions that compete with each other; 0 is the whole prompt."""
    number = _parse_integer(value)
    if number is None or not 0 <= number <= MOST_WINDOW:
        raise rejected(
            "window",
            value,
            f"give a whole number of tokens up to {MOST_WINDOW}, or 0 for the whole prompt",
        )
    return number


def parse_layers(value: object) -> tuple[int, ...]:
    """Layer indices from 0, in any order: "7,26,14" or a sequence of integers."""
    allowed = "give different layer indices from 0, such as 7,26,14"
    items: Sequence[object]
    if isinstance(value, str):
        items = [item.strip() for item in value.split(",")]
    elif isinstance(value, Sequence):
        items = value
    else:
        raise rejected("layers", value, allowed)
    indices = [_parse_integer(item) for item in items]
    layers = tuple(index for index in indices if index is not None and index >= 0)
    if not layers or len(layers) != len(indices) or len(set(layers)) != len(layers):
        raise rejected("layers", value, allowed)
    return layers


def parse_profile(value: object) -> str:
    """Path of a profile file; whether it can be used is known once the model is."""
    if not isinstance(value, str) or not value:
        raise rejected("profile", value, "give the path of a profile file")
    return value


def parse_calibrate_seconds(value: object) -> float:
    """Time for a calibration at start-up; 0 is none."""
    number = _parse_number(value)
    if number is None or number < 0:
        raise rejected("calibrate_seconds", value, "give a number of seconds, or 0 for none")
    return number


def parse_attention(value: object) -> str:
    """How the selected tokens attend."""
    if not isinstance(value, str) or value not in ATTENTION_BACKENDS:
        raise rejected("attention", value, f"give one of {', '.join(ATTENTION_BACKENDS)}")
    return value


_PARSERS = {
    "ratio": parse_ratio,
    "keep": parse_keep,
    "window": parse_window,
    "layers": parse_layers,
    "profile": parse_profile,
    "calibrate_seconds": parse_calibrate_seconds,
    "attention": parse_attention,
}


@dataclass(frozen=True)
class Options:
    """The options as given; `None` is "not given"."""

    ratio: float | None = None
    keep: float = DEFAULT_KEEP
    window: int = DEFAULT_WINDOW
    layers: tuple[int, ...] | None = None
    profile: str | None = None
    calibrate_seconds: float = DEFAULT_CALIBRATE_SECONDS
    attention: str = "auto"

    @classmethod
    def from_mapping(cls, given: object) -> "Options":
        """Validate the keys and values of `additional_config["orthorank"]`.

        Raises:
            OptionError: an unknown key, a value out of range, or options that
                exclude each other.
        """
        given = checked_mapping(given)
        for name in given:
            if name not in _PARSERS:
                raise OptionError(
                    f'additional_config["orthorank"] has the unknown key {name!r}: '
                    f"allowed are {', '.join(OPTION_NAMES)}"
                )
        parsed: dict[str, Any] = {
            name: _PARSERS[name](value) for name, value in given.items() if value is not None
        }
        options = cls(**parsed)
        if options.ratio is None and options.layers is None and parsed:
            raise rejected(
                next(iter(parsed)),
                given[next(iter(parsed))],
                "it changes nothing without --orthorank-ratio",
            )
        if options.is_active:
            options._check_together()
        return options

    @property
    def is_active(self) -> bool:
        """Whether OrthoRank was asked for; a ratio of 0 switches everything off."""
        return self.layers is not None if self.ratio is None else self.ratio > 0

    def _check_together(self) -> None:
        if self.layers is not None and self.profile is not None:
            raise rejected(
                "layers",
                ",".join(map(str, self.layers)),
                f"it excludes --orthorank-profile {self.profile}; give one of them",
            )
        if self.ratio is not None and self.ratio > 1 - self.keep + 1e-9:
            raise rejected(
                "ratio",
                self.ratio,
                f"with --orthorank-keep {self.keep:.4g} give at most {1 - self.keep:.4g}, "
                "which makes every layer selective",
            )


def _parse_number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        # "1/3" as well as 0.25: the default is a fraction. Only then one, as Fraction writes out
        # all the digits of "1e999999999".
        is_fraction = isinstance(value, str) and "/" in value
        number = float(Fraction(value)) if is_fraction else float(value)
    except (ValueError, OverflowError, ZeroDivisionError):
        return None
    return number if math.isfinite(number) else None


def _parse_integer(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    try:
        return int(value)
    except ValueError:
        return None
