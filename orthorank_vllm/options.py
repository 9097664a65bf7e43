"""The table of options: flags, keys offline and errors are made of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

DEFAULT_KEEP = 1 / 3
DEFAULT_WINDOW = 128
# What `attention` may be: ways for a sparse set of queries, see the package of that name.
ATTENTION_BACKENDS = ("auto", "gather", "triton", "cpu")
# Positions are counted in 32 bits on the way.
MOST_WINDOW = 2**31 - 1


class OptionError(ValueError):
    """A user's mistake, told in one line.

    Args:
        option: its name as the user gave it; the whole line, where no value is wrong.
        value, allowed: what was given, and what can be.
    """

    def __init__(self, option: str, value: object = None, allowed: str = "") -> None:
        super().__init__(option, value, allowed)
        self.option, self.value, self.allowed = option, value, allowed

    def __str__(self) -> str:
        return f"{self.option} {self.of_value}" if self.allowed else self.option

    @property
    def of_value(self) -> str:
        """The line after the option's name."""
        # A value may have lines of its own.
        return f"{' '.join(str(self.value).split())}: not allowed, {self.allowed}"


@dataclass(frozen=True)
class Option:
    """One row of the table.

    Attributes:
        name: the key offline, and what its flag is called after `--orthorank-`.
        help: for whom the flags are listed.
        read: makes the type that is used of what was given, or raises; None for a flag that
            takes no value and is no key offline.
        holds: whether what was read is allowed.
        allowed: that, for whom gave something else.
        default: where nothing was given; None is "not given".
    """

    name: str
    help: str
    read: Callable[[Any], Any] | None = None
    holds: Callable[[Any], Any] = bool
    allowed: str = ""
    default: Any = None

    @property
    def flag(self) -> str:
        """The flag of `vllm serve`."""
        return f"--orthorank-{self.name.replace('_', '-')}"

    def parse(self, value: object, called: str = "") -> Any:
        """The value as it is used, or an `OptionError` that names the flag, or `called`."""
        assert self.read is not None
        with suppress(TypeError, ValueError, ArithmeticError):
            if self.holds(parsed := self.read(value)):
                return parsed
        raise OptionError(called or self.flag, value, self.allowed)

    def rejected(self, value: object, allowed: str) -> OptionError:
        """The error for a value that can be, but not here."""
        return OptionError(self.flag, value, allowed)


def _of_type(value: Any, *types: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, types):
        raise TypeError
    return value


def _number(value: object) -> float:
    given = _of_type(value, int, float, str)
    # "1/3" as well as 0.25: the default is a fraction. Only then one, as Fraction writes out
    # all the digits of "1e999999999".
    return float(Fraction(given) if isinstance(given, str) and "/" in given else given)


def _integer(value: object) -> int:
    return int(_of_type(value, int, str))


def _integers(value: object) -> tuple[int, ...]:
    items = value.split(",") if isinstance(value, str) else _of_type(value, Sequence)
    return tuple(_integer(item) for item in items)


RATIO = Option(
    "ratio",
    "Fraction of the prompt's token-layer updates to skip, from 0 to below 1 - keep. "
    "0 or absent: stock vLLM.",
    _number,
    lambda number: 0 <= number < 1,
    "give a number from 0 (off) to below 1",
)
KEEP = Option(
    "keep",
    "Fraction of the tokens that a selective layer updates (default: 1/3).",
    _number,
    lambda number: 0 < number < 1,
    "give a number above 0 and below 1",
    DEFAULT_KEEP,
)
WINDOW = Option(
    "window",
    "Prompt positions that compete with each other; 0 is the whole prompt "
    f"(default: {DEFAULT_WINDOW}).",
    _integer,
    lambda number: 0 <= number <= MOST_WINDOW,
    f"give a whole number of tokens up to {MOST_WINDOW}, or 0 for the whole prompt",
    DEFAULT_WINDOW,
)
LAYERS = Option(
    "layers",
    "The selective layers, such as 7,26,14 (default: from the model's profile).",
    _integers,
    lambda layers: layers and min(layers) >= 0 and len(set(layers)) == len(layers),
    "give different layer indices from 0, such as 7,26,14",
)
PROFILE = Option(
    "profile",
    "A file with the model's layers in the order in which to make them selective "
    "(default: one that `orthorank calibrate` made, or the shipped one).",
    lambda value: _of_type(value, str),
    allowed="give the path of a profile file",
)
CALIBRATE_SECONDS = Option(
    "calibrate_seconds",
    "Where the model has no profile: time to choose its layers by measurement when it is first "
    "started; 0 takes evenly spaced ones (default: 60).",
    _number,
    lambda number: 0 <= number < math.inf,
    "give a number of seconds, or 0 for none",
    60.0,
)
ATTENTION = Option(
    "attention",
    "How the selected tokens attend, for comparisons and as a way out: one of "
    f"{', '.join(ATTENTION_BACKENDS)} (default: auto).",
    lambda value: _of_type(value, str),
    lambda name: name in ATTENTION_BACKENDS,
    f"give one of {', '.join(ATTENTION_BACKENDS)}",
    "auto",
)
ENDPOINT = Option(
    "endpoint", "Let the server answer GET /orthorank: what it runs and has counted, as JSON."
)
OPTIONS = (RATIO, KEEP, WINDOW, LAYERS, PROFILE, CALIBRATE_SECONDS, ATTENTION, ENDPOINT)
OFFLINE = {option.name: option for option in OPTIONS if option.read is not None}


def checked_mapping(given: object) -> Mapping[str, Any]:
    """`additional_config["orthorank"]`, of unchecked keys; an `OptionError` if it is no mapping."""
    if not isinstance(given, Mapping):
        raise OptionError(
            f'additional_config["orthorank"] = {" ".join(repr(given).split())}: not allowed, '
            f"give a dictionary with keys from {', '.join(OFFLINE)}"
        )
    return given


@dataclass(frozen=True)
class Options:
    """The options as given; `None` is "not given"."""

    ratio: float | None
    keep: float
    window: int
    layers: tuple[int, ...] | None
    profile: str | None
    calibrate_seconds: float
    attention: str

    @classmethod
    def from_mapping(cls, given: object) -> "Options":
        """Validate the keys and values of `additional_config["orthorank"]`.

        Raises:
            OptionError: an unknown key, a value out of range, or options that exclude each other.
        """
        given = checked_mapping(given)
        for name in given:
            if name not in OFFLINE:
                raise OptionError(
                    f'additional_config["orthorank"] has the unknown key {name!r}: '
                    f"allowed are {', '.join(OFFLINE)}"
                )
        parsed = {
            name: OFFLINE[name].parse(value) for name, value in given.items() if value is not None
        }
        options = cls(**{name: option.default for name, option in OFFLINE.items()} | parsed)
        if options.ratio is None and options.layers is None and parsed:
            name = next(iter(parsed))
            raise OFFLINE[name].rejected(given[name], f"it changes nothing without {RATIO.flag}")
        if options.is_active:
            options._check_together()
        return options

    @property
    def is_active(self) -> bool:
        """Whether OrthoRank was asked for; a ratio of 0 switches everything off."""
        return self.layers is not None if self.ratio is None else self.ratio > 0

    def _check_together(self) -> None:
        if self.layers is not None and self.profile is not None:
            raise LAYERS.rejected(
                ",".join(map(str, self.layers)),
                f"it excludes {PROFILE.flag} {self.profile}; give one of them",
            )
        if self.ratio is not None and self.ratio > 1 - self.keep + 1e-9:
            raise RATIO.rejected(
                self.ratio,
                f"with {KEEP.flag} {self.keep:.4g} give at most {1 - self.keep:.4g}, "
                "which makes every layer selective",
            )
