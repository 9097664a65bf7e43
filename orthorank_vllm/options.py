"""The table of options: flags, keys offline and errors are made of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

# The paper's: of layers that are given without a keep.
DEFAULT_KEEP = 1 / 3
DEFAULT_WINDOW = 128
DEFAULT_TAIL = 64
# NOT MEASURED: up to some 170 tokens an H100 reads an 8B model's weights for longer than it
# computes, so that skipping saves nothing, and stock vLLM has CUDA graphs.
MIN_PROMPT_ON_GPU = 256
DEFAULT_MAX_LOSS = 0.02
AUTO = "auto"
ON, OFF = "on", "off"
# What `attention` may be: ways for a sparse set of queries, see the package of that name.
ATTENTION_BACKENDS = ("auto", "gather", "triton", "cpu")
# Positions are counted in 32 bits on the way.
MOST_WINDOW = 2**31 - 1


class LayerKeep(NamedTuple):
    """A selective layer, and the fraction of the tokens that it updates."""

    layer: int
    keep: float

    def __str__(self) -> str:
        return f"{self.layer}:{self.keep:.4g}"


class GivenLayer(NamedTuple):
    """A selective layer as a user gives it, with a keep of its own or None."""

    layer: int
    keep: float | None = None

    @classmethod
    def read(cls, given: object) -> "GivenLayer":
        """A layer such as 7, "7", "7:1/4" or (7, 0.25), or raise."""
        if isinstance(given, str):
            layer, has_keep, keep = given.partition(":")
            return cls(int(layer), _number(keep) if has_keep else None)
        if isinstance(given, Sequence):
            layer, keep = given
            return cls(_integer(layer), None if keep is None else _number(keep))
        return cls(_integer(given))

    def __str__(self) -> str:
        return str(self.layer) if self.keep is None else str(LayerKeep(self.layer, self.keep))

    def with_keep(self, common: float | None) -> LayerKeep:
        """With its own keep, or the one of all layers, or the default one."""
        default = DEFAULT_KEEP if common is None else common
        return LayerKeep(self.layer, default if self.keep is None else self.keep)


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
        try:
            value = " ".join(str(self.value).split())
        except ValueError:
            # Of whole numbers with more than some thousand digits.
            value = "(so large a number)"
        return f"{value}: not allowed, {self.allowed}"


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


def _switch(value: object) -> bool:
    # YAML reads a bare `off` as false.
    return value if isinstance(value, bool) else (OFF, ON).index(_of_type(value, str)) == 1


def _layers(value: object) -> tuple[GivenLayer, ...]:
    items = value.split(",") if isinstance(value, str) else _of_type(value, Sequence)
    return tuple(GivenLayer.read(item) for item in items)


def _are_layers(given: tuple[GivenLayer, ...]) -> bool:
    layers = {layer for layer, _ in given}
    keeps = (keep for _, keep in given if keep is not None)
    is_each_once = len(layers) == len(given) > 0
    return is_each_once and min(layers) >= 0 and all(0 <= keep < 1 for keep in keeps)


RATIO = Option(
    "ratio",
    "Fraction of the prompt's token-layer updates to skip, from 0 to below 1, or "
    f'"{AUTO}": as much as --orthorank-max-loss allows. 0 or absent: stock vLLM.',
    lambda value: AUTO if value == AUTO else _number(value),
    lambda ratio: ratio == AUTO or 0 <= ratio < 1,
    f"give a number from 0 (off) to below 1, or {AUTO}",
)
MAX_RATIO = Option(
    "max_ratio",
    "The largest ratio that a request may ask for by its `orthorank_ratio` (default: "
    f"{RATIO.flag}).",
    _number,
    lambda number: 0 <= number < 1,
    "give a number from 0 to below 1",
)
MAX_LOSS = Option(
    "max_loss",
    f"With --orthorank-ratio {AUTO}: the most that an answer may lose on the worst kind of text, "
    f"in nats per token, by the profile's figures (default: {DEFAULT_MAX_LOSS}).",
    _number,
    lambda number: 0 <= number < math.inf,
    "give a number of nats per token from 0",
)
KEEP = Option(
    "keep",
    "Fraction of the tokens that every selective layer updates (default: each layer's own in the "
    "profile).",
    _number,
    lambda number: 0 <= number < 1,
    "give a number from 0 to below 1",
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
TAIL = Option(
    "tail",
    f"Last tokens of each prompt that every layer updates (default: {DEFAULT_TAIL}).",
    _integer,
    lambda number: 1 <= number <= MOST_WINDOW,
    f"give a whole number of tokens from 1 to {MOST_WINDOW}",
    DEFAULT_TAIL,
)
MIN_PROMPT = Option(
    "min_prompt",
    "Tokens of a prompt below which nothing of it is skipped (default: "
    f"{MIN_PROMPT_ON_GPU} on a GPU, 0 elsewhere).",
    _integer,
    lambda number: 0 <= number <= MOST_WINDOW,
    f"give a whole number of tokens from 0 (none) to {MOST_WINDOW}",
)
ALIGNED = Option(
    "aligned",
    f"Whether prompts are cut into chunks, and reused, at windows' ends alone, so that the same "
    f"tokens of a prompt are computed under any load: {ON} or {OFF} (default: {ON}).",
    _switch,
    lambda _: True,
    f"give {ON} or {OFF}",
    True,
)
LAYERS = Option(
    "layers",
    "The selective layers, each with its keep if it is to have its own, such as 29:0,26:0,12:1/4 "
    "or 7,26 (default: from the model's profile).",
    _layers,
    _are_layers,
    "give different layer indices from 0, with or without a keep from 0 to below 1, such as "
    '29:0,12:1/4 or 7,26 (in a YAML list with quotes, "29:0")',
)
STAND_IN = Option(
    "stand_in",
    "What the tokens that a layer skips get in place of its update: "
    f'"{AUTO}", the linear maps that were fitted with the profile; "{OFF}", nothing; or a file of '
    f"such maps (default: {AUTO}).",
    lambda value: OFF if value is False else _of_type(value, str),
    allowed=f"give {AUTO}, {OFF} or the path of a file that `orthorank calibrate` made",
    default=AUTO,
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
    "Where the model has no profile: the most time that a start takes to choose its layers by "
    "measurement; a later start goes on. 0 takes the last ones unmeasured (default: 300).",
    _number,
    lambda number: 0 <= number < math.inf,
    "give a number of seconds, or 0 for none",
    300.0,
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
SHADOW = Option(
    "shadow",
    "Fraction of the prompts to compute once more, densely, when no request waits, so that the "
    "metrics orthorank_shadow_* tell what answers lose by it, from 0 to 1 (default: 0, none).",
    _number,
    lambda number: 0 <= number <= 1,
    "give a number from 0 (none) to 1 (every prompt)",
    0.0,
)
ENDPOINT = Option(
    "endpoint", "Let the server answer GET /orthorank: what it runs and has counted, as JSON."
)
OPTIONS = (
    *(RATIO, MAX_RATIO, MAX_LOSS, KEEP, WINDOW, TAIL, MIN_PROMPT, ALIGNED, STAND_IN, LAYERS),
    *(PROFILE, CALIBRATE_SECONDS, ATTENTION, SHADOW, ENDPOINT),
)
OFFLINE = {option.name: option for option in OPTIONS if option.read is not None}


def at_most(number: float) -> str:
    """Four digits of a number that is to be given again, rounded down."""
    return f"{math.floor(number * 1e4 + 1e-6) / 1e4:g}"


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

    ratio: Any
    max_ratio: float | None
    max_loss: float | None
    keep: float | None
    window: int
    tail: int
    min_prompt: int | None
    aligned: bool
    stand_in: str
    layers: tuple[GivenLayer, ...] | None
    profile: str | None
    calibrate_seconds: float
    attention: str
    shadow: float

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
        if parsed.get("max_ratio") and "layers" not in parsed:
            parsed.setdefault("ratio", 0.0)
        options = cls(**{name: option.default for name, option in OFFLINE.items()} | parsed)
        if options.ratio is None and options.layers is None and parsed:
            name = next(iter(parsed))
            raise OFFLINE[name].rejected(given[name], f"it changes nothing without {RATIO.flag}")
        if options.is_active:
            options._check_together()
        return options

    @property
    def is_active(self) -> bool:
        """Whether OrthoRank was asked for; a ratio of 0 that requests may not raise is none."""
        if self.max_ratio:
            return True
        return self.layers is not None if self.ratio is None else self.ratio != 0

    @property
    def most_asked(self) -> tuple[Option, Any]:
        """The largest ratio that was given, a number or `auto`, and by what option; or None."""
        if self.max_ratio is not None:
            return MAX_RATIO, self.max_ratio
        return RATIO, self.ratio

    @property
    def layer_keeps(self) -> tuple[LayerKeep, ...]:
        """The layers given by hand, each with a keep."""
        return tuple(layer.with_keep(self.keep) for layer in self.layers or ())

    def _check_together(self) -> None:
        if self.layers is not None and self.profile is not None:
            raise LAYERS.rejected(
                ",".join(map(str, self.layers)),
                f"it excludes {PROFILE.flag} {self.profile}; give one of them",
            )
        if self.ratio == AUTO:
            for option, value in ((KEEP, self.keep), (LAYERS, self.layers)):
                if value is not None:
                    raise RATIO.rejected(
                        AUTO,
                        f"it goes by the figures of a profile, and {option.flag} changes what they "
                        "are of; give a number, or leave that out",
                    )
        elif self.max_loss is not None:
            raise MAX_LOSS.rejected(self.max_loss, f"it changes nothing without {RATIO.flag} auto")
        elif self.ratio is not None and self.most_asked[1] < self.ratio:
            raise MAX_RATIO.rejected(
                self.max_ratio,
                f"with {RATIO.flag} {self.ratio:.4g} give a number from that to below 1",
            )
        option, most = self.most_asked
        if most not in (None, AUTO) and self.keep is not None and most > 1 - self.keep + 1e-9:
            raise option.rejected(
                most,
                f"with {KEEP.flag} {self.keep:.4g} give at most {at_most(1 - self.keep)}, "
                "which makes every layer selective",
            )
