"""What was measured of a model's layers: read it, write it.

A profile is JSON in the form of `profile.schema.json`.
"""

import hashlib
import itertools
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, NamedTuple

from orthorank_vllm.files import write_whole
from orthorank_vllm.options import LayerKeep

FORMAT = 5
MOST_HEADER = 10_000_000
MOST_MESSAGE = 200
SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rope_theta",
    "vocab_size",
)
# What a configuration holds besides the model: where it came from, how it is run.
_NOT_THE_MODEL = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")


class ProfileError(ValueError):
    """Why a profile cannot be used, in half a sentence."""


class MeasuredRule(NamedTuple):
    """What else than its layers decides what an answer loses: a profile is of one such rule."""

    window: int
    tail: int
    has_stand_in: bool


@dataclass(frozen=True)
class Cost:
    """What an answer loses when its prompt is computed in some way.

    Attributes:
        loss: nats per answer token, KL(dense, sparse), by kind of text.
        found: share of the numbers in a list in its prompt that is found, of those that the dense
            model finds; None where that was not measured.
    """

    loss: Mapping[str, float]
    found: float | None = None

    @property
    def worst(self) -> float:
        """The loss of the kind of text that loses most."""
        return max(self.loss.values())

    def __str__(self) -> str:
        losses = ", ".join(f"{kind} {loss:.3f}" for kind, loss in self.loss.items())
        found = "" if self.found is None else f"; {self.found:.0%} of numbers found"
        return f"{losses} nats a token{found}"


@dataclass(frozen=True)
class Entry:
    """One more selective layer.

    Attributes:
        keep: fraction of the tokens that it updates.
        cost: with it and all before it, on the text that it was chosen on; None where that was
            not measured.
        held_back: as `cost`, on text that nothing was chosen on.
    """

    layer: int
    keep: float
    cost: Cost | None = None
    held_back: Cost | None = None

    @property
    def layer_keep(self) -> LayerKeep:
        return LayerKeep(self.layer, self.keep)


@dataclass(frozen=True)
class Profile:
    """Layers with their keeps in the order in which to make them selective, as measured.

    Attributes:
        model: see `model_identity`; a shipped one fits by shape alone.
        entries: the one that costs least first.
        window, tail: of the rule that it was measured with.
        weights: fingerprint of those measured on (`model.fingerprint`); None if there is none.
        alone: of each layer, what it costs by itself with keep 0, in nats per token by kind of
            text; on few samples.
        stand_in: what stood in for what its layers left out: the "rank" of the maps, their
            "share" of a layer's work, what they were "fitted_on" and what tokens are "chosen_by"
            beside them; "sha256" of their file, once it is written. None: nothing did.
        path: the file that it was read from.
        data: of the texts, by what they were for, "name", "sha256" and the samples of each kind.
    """

    name: str
    model: dict[str, Any]
    entries: tuple[Entry, ...]
    window: int
    tail: int
    method: str = "orthorank"
    weights: str | None = None
    alone: tuple[Mapping[str, float], ...] = ()
    stand_in: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    dtype: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    date: str | None = None
    path: Path | None = field(default=None, compare=False)

    @property
    def num_layers(self) -> int:
        return int(self.model["num_hidden_layers"])

    @property
    def rule(self) -> MeasuredRule:
        """What was measured, its layers aside."""
        return MeasuredRule(self.window, self.tail, self.stand_in is not None)

    @property
    def identity(self) -> dict[str, Any]:
        """What two measurements must share for one to go on where the other stopped."""
        names = ("model", "weights", "method", "window", "tail", "data", "dtype")
        fit = {k: v for k, v in (self.stand_in or {}).items() if k != "sha256"}
        return {name: getattr(self, name) for name in names} | {"stand_in": fit}

    @property
    def share(self) -> float:
        """What its stand-ins cost of the work that a skipped update saves."""
        return float(self.stand_in["share"]) if self.stand_in else 0.0

    @property
    def ratios(self) -> list[float]:
        """The ratio that is reached with each entry and those before it."""
        saved = itertools.accumulate(1 - entry.keep for entry in self.entries)
        return [total * (1 - self.share) / self.num_layers for total in saved]

    @property
    def stand_in_path(self) -> Path | None:
        """Where its stand-ins are; None if it has none."""
        if self.stand_in is None or self.path is None:
            return None
        return stand_ins_beside(self.path)

    def check_stand_in(self) -> None:
        """Check that its stand-ins are there, and those that it was measured with.

        Raises:
            ProfileError: they are not.
        """
        path = self.stand_in_path
        if path is None or self.stand_in is None:
            return
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise ProfileError(
                f"its stand-ins, {path}, cannot be read ({error.strerror}); keep both files "
                "together, or give --orthorank-stand-in off"
            ) from None
        if found != self.stand_in.get("sha256"):
            raise ProfileError(
                f"{path} holds other stand-ins than it was measured with; measure it anew with "
                "`orthorank calibrate`"
            )

    def fits(self, model_shape: Mapping[str, Any]) -> bool:
        return all(self.model[key] == model_shape.get(key) for key in SHAPE_KEYS)

    def check_fits(self, model_shape: Mapping[str, Any]) -> None:
        """Check that a profile was measured on a model of this shape.

        Raises:
            ProfileError: it was measured on another model; names what differs.
        """
        differing = [
            f"{key} {self.model[key]} against {model_shape.get(key)}"
            for key in SHAPE_KEYS
            if self.model[key] != model_shape.get(key)
        ]
        if differing:
            raise ProfileError(f"it was measured on another model ({', '.join(differing)})")

    def write(self, path: Path) -> None:
        """Write whole or not at all: a reader never meets half a profile.

        Raises:
            OSError: nothing was changed.
        """
        content = {
            "format": FORMAT,
            **{
                key: value
                for key, value in vars(self).items()
                if value not in (None, {}, ()) and key != "path"
            },
            "entries": [_entry_as_dict(entry) for entry in self.entries],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=2) + "\n")


def model_shape(hf_config: Any) -> dict[str, Any]:
    """What identifies an architecture's weights, whatever its folder is called.

    Args:
        hf_config: a `transformers` configuration.
    """
    rope = getattr(hf_config, "rope_parameters", None) or {}
    shape = {key: getattr(hf_config, key, None) for key in SHAPE_KEYS}
    shape["rope_theta"] = rope.get("rope_theta", shape["rope_theta"])
    if shape["num_key_value_heads"] is None:
        shape["num_key_value_heads"] = shape["num_attention_heads"]
    return shape


def model_identity(hf_config: Any) -> dict[str, Any]:
    """`model_shape`, and the hash of the whole configuration as "config_sha256"."""
    return {**model_shape(hf_config), "config_sha256": config_hash(hf_config)}


def config_hash(hf_config: Any) -> str:
    """SHA-256 of all that the configuration says about the model itself."""
    settings = {
        key: value
        for key, value in hf_config.to_diff_dict().items()
        if key not in _NOT_THE_MODEL and not key.startswith("_")
    }
    canonical = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_profile(path: str | Path) -> Profile:
    """Read and check a profile's file.

    Raises:
        ProfileError: missing, not JSON, or not a profile.
    """
    try:
        content = _loaded(Path(path).read_bytes())
    except OSError as error:
        raise ProfileError(f"it cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ProfileError(f"it is not JSON ({error})") from None
    return from_json(content, Path(path))


def _loaded(text: bytes) -> Any:
    """What JSON says; a `ValueError` also for what only Python's says, NaN, and for depths."""

    def no_json(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(text, parse_constant=no_json)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def stand_ins_beside(path: Path) -> Path:
    """Where the stand-ins of a profile's file are."""
    return path.with_suffix(".safetensors")


def read_stand_in_facts(path: str | Path) -> dict[str, str]:
    """What a file of stand-ins says of itself: the "model" it was fitted on, its "share".

    Raises:
        ProfileError: missing, or no such file.
    """
    try:
        with Path(path).open("rb") as file:
            # How safetensors begin: the length of what follows, then JSON.
            (length,) = struct.unpack("<Q", file.read(8))
            content = _loaded(file.read(min(length, MOST_HEADER)))
        facts = dict(content["__metadata__"])
        if not 0 <= float(facts["share"]) < 1:
            raise ValueError
        facts["model"]
        return facts
    except OSError as error:
        raise ProfileError(f"it cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, OverflowError, struct.error):
        raise ProfileError(
            "it holds no stand-ins; give one that `orthorank calibrate` made, NAME.safetensors "
            "beside NAME.json"
        ) from None


def stand_in_share_of(model: Mapping[str, Any], path: str | Path) -> float:
    """The "share" in a file of stand-ins, once it is known to be the model's.

    Args:
        model: see `model_identity`.

    Raises:
        ProfileError: as `read_stand_in_facts`, or it is another model's.
    """
    facts = read_stand_in_facts(path)
    if facts["model"] != model["config_sha256"]:
        raise ProfileError("it was fitted on a model of another configuration")
    return float(facts["share"])


def read_profile_of(model: Mapping[str, Any], path: str | Path) -> Profile:
    """Read a profile's file and check that it is the model's.

    Args:
        model: see `model_identity`.

    Raises:
        ProfileError: as `read_profile`, or it is another model's.
    """
    profile = read_profile(path)
    profile.check_fits(model)
    return profile


def _entry_as_dict(entry: Entry) -> dict[str, Any]:
    costs = {"cost": entry.cost, "held_back": entry.held_back}
    return {
        "layer": entry.layer,
        "keep": entry.keep,
        **{
            name: {"loss": dict(cost.loss)} | ({} if cost.found is None else {"found": cost.found})
            for name, cost in costs.items()
            if cost is not None
        },
    }


def _entry_of(content: Mapping[str, Any]) -> Entry:
    costs = {name: Cost(**content[name]) for name in ("cost", "held_back") if name in content}
    return Entry(content["layer"], content["keep"], **costs)


def from_json(content: Any, path: Path) -> Profile:
    """Check what a profile's file holds.

    Raises:
        ProfileError: it is not a profile.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    if not isinstance(content, dict) or "format" not in content:
        raise ProfileError("it is not an OrthoRank profile")
    if content["format"] != FORMAT:
        raise ProfileError(
            f"its format is {shortened(content['format'])} and this orthorank-vllm reads {FORMAT}; "
            "measure it anew with `orthorank calibrate`"
        )
    schema = json.loads((resources.files("orthorank_vllm") / "profile.schema.json").read_text())
    error = best_match(Draft202012Validator(schema).iter_errors(content))
    if error is not None:
        where = "".join(f"[{part!r}]" for part in error.absolute_path)
        message = error.message
        if len(message) > MOST_MESSAGE:
            # It begins with what was found, however much that is, and ends with what is wrong.
            half = MOST_MESSAGE // 2
            message = f"{message[:half]} … {message[-half:]}"
        raise ProfileError(f"it is not a valid profile: {where} {message}".replace("  ", " "))
    num_layers = content["model"]["num_hidden_layers"]
    layers = [entry["layer"] for entry in content["entries"]]
    if any(layer >= num_layers for layer in layers) or len(set(layers)) < len(layers):
        raise ProfileError(f'its "entries" must hold different layer indices below {num_layers}')
    fields = {key: value for key, value in content.items() if key != "format"}
    entries, alone = map(_entry_of, content["entries"]), content.get("alone", ())
    return Profile(**{**fields, "entries": tuple(entries), "alone": tuple(alone)}, path=path)
