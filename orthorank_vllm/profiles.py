"""Layer orders measured for a model: read one, find one, write one.

A profile is JSON in the form of `profile.schema.json`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from orthorank_vllm.files import write_whole

FORMAT = 4
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


@dataclass(frozen=True)
class Profile:
    """A measured layer order, and what it was measured on.

    Attributes:
        model: see `model_identity`; a shipped one fits by shape alone.
        weights: fingerprint of those measured on (`engine.fingerprint`); None if there is none.
        order: layers, the one that costs least first.
        losses: nats per token after each; None where it was not measured.
        lookups: after each, the share of the numbers in a list in its prompt that is still found,
            of those that the dense model finds; None or missing where it was not measured.
        tried: of a step under way, the loss with each layer tried.
        data: of the calibration text, "name", "sha256", "tokens" and "length".
    """

    name: str
    model: dict[str, Any]
    order: tuple[int, ...]
    keep: float
    window: int
    method: str = "orthorank"
    weights: str | None = None
    losses: tuple[float | None, ...] = ()
    lookups: tuple[float | None, ...] = ()
    dense_loss: float | None = None
    tried: dict[int, float] = field(default_factory=dict)
    trials: int = 0
    data: dict[str, Any] | None = None
    dtype: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    date: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What two measurements must share for one to go on where the other stopped."""
        names = ("model", "weights", "method", "keep", "window", "data", "dtype")
        return {name: getattr(self, name) for name in names}

    def describe(self, keep: float) -> str:
        """The profile, in the start-up line of a server that runs with `keep`."""
        other = f" (measured with keep {self.keep:.3f})" if abs(self.keep - keep) > 1e-3 else ""
        return f"profile {self.name}{other}"

    def lookups_with(self, layers: int, keep: float, window: int) -> float | None:
        """The share of look-ups that is found with so many layers; None if it was not measured."""
        is_the_rule = abs(self.keep - keep) < 1e-3 and self.window == window
        return self.lookups[layers - 1] if is_the_rule and layers <= len(self.lookups) else None

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
            **{key: value for key, value in vars(self).items() if value not in (None, {}, ())},
            "order": list(self.order),
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
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ProfileError(f"it cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ProfileError(f"it is not JSON ({error})") from None
    return _from_json(content)


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


def kept_folder(cache_root: str | Path) -> Path:
    """Where all profiles are kept that were measured on this machine."""
    return Path(cache_root) / "orthorank"


def cached_path(
    cache_root: str | Path, sha256: str, weights: str, keep: float, window: int
) -> Path:
    """Where the profile of a model is kept that was measured on this machine.

    Args:
        sha256, weights: of its configuration, and the fingerprint of its weights.
    """
    return kept_folder(cache_root) / _cached_name(sha256, weights[:16], keep, window)


def _cached_name(sha256: str, weights: str, keep: float, window: int) -> str:
    return f"{sha256[:32]}-{weights}-keep{keep:.4f}-window{window}.json"


def kept_profiles(cache_root: str | Path, sha256: str, keep: float, window: int) -> list[Path]:
    """Where `cached_path` has profiles of this configuration, of whatever weights; newest first."""
    found = kept_folder(cache_root).glob(_cached_name(sha256, "*", keep, window))
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def shipped_profiles() -> Iterator[Profile]:
    """The profiles in the package."""
    folder = resources.files("orthorank_vllm") / "profile_data"
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".json"):
            yield _from_json(json.loads(entry.read_text()))


def shipped_profile(model: Mapping[str, Any]) -> Profile | None:
    """The profile in the package that fits by shape, whatever weights it was measured on."""
    return next((profile for profile in shipped_profiles() if profile.fits(model)), None)


def find_profile(
    model: Mapping[str, Any], weights: str | None, keep: float, window: int, cache_root: str | Path
) -> Profile | None:
    """The profile of a model: measured on this machine with this rule, or else shipped.

    Args:
        model: see `model_identity`.
        weights: their fingerprint; without one nothing is known to be measured on them.
        cache_root: vLLM's, see `cached_path`.
    """
    if weights is not None:
        path = cached_path(cache_root, model["config_sha256"], weights, keep, window)
        try:
            kept = read_profile(path)
        except ProfileError:
            # Not there, or of another version: measured anew where that is asked for.
            return shipped_profile(model)
        if kept.weights == weights:
            return kept
    return shipped_profile(model)


def _from_json(content: Any) -> Profile:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    if not isinstance(content, dict) or "format" not in content:
        raise ProfileError("it is not an OrthoRank profile")
    if content["format"] != FORMAT:
        raise ProfileError(
            f"its format is {content['format']!r} and this orthorank-vllm reads {FORMAT}; "
            "measure it anew with `orthorank calibrate`"
        )
    schema = json.loads((resources.files("orthorank_vllm") / "profile.schema.json").read_text())
    error = best_match(Draft202012Validator(schema).iter_errors(content))
    if error is not None:
        where = "".join(f"[{part!r}]" for part in error.absolute_path)
        raise ProfileError(f"it is not a valid profile: {where} {error.message}".replace("  ", " "))
    num_layers = content["model"]["num_hidden_layers"]
    if any(layer >= num_layers for layer in content["order"]):
        raise ProfileError(f'its "order" must hold layer indices below {num_layers}')
    fields = {key: value for key, value in content.items() if key != "format"}
    return Profile(
        **{
            **fields,
            "order": tuple(content["order"]),
            "losses": tuple(content.get("losses", ())),
            "lookups": tuple(content.get("lookups", ())),
            "tried": {int(layer): loss for layer, loss in content.get("tried", {}).items()},
        }
    )
