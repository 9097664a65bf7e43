"""Layer orders measured for a model: read one, find one, write one.

A profile is JSON: `format` (1), `name`, `model` (the shape it was measured on),
`order` (layers, the one that costs least quality first) and how it was measured.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

FORMAT = 1
SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rope_theta",
    "vocab_size",
)


class ProfileError(ValueError):
    """Why a profile cannot be used, in half a sentence."""


@dataclass(frozen=True)
class Profile:
    """A measured layer order and what it was measured on."""

    name: str
    model: dict[str, Any]
    order: tuple[int, ...]
    measured: dict[str, Any] = field(default_factory=dict)

    def fits(self, model_shape: Mapping[str, Any]) -> bool:
        return all(self.model[key] == model_shape.get(key) for key in SHAPE_KEYS)

    def check_fits(self, model_shape: Mapping[str, Any]) -> None:
        """
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
        """Write whole or not at all: a reader never meets half a profile."""
        content = {
            "format": FORMAT,
            "name": self.name,
            "model": self.model,
            "order": list(self.order),
            "measured": self.measured,
        }
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(path)


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


def read_profile(path: str | Path) -> Profile:
    """
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


def find_profile(shape: Mapping[str, Any]) -> Profile | None:
    """The shipped profile of the model with this shape."""
    folder = resources.files("orthorank_vllm") / "profile_data"
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".json"):
            profile = _from_json(json.loads(entry.read_text()))
            if profile.fits(shape):
                return profile
    return None


def _from_json(content: Any) -> Profile:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ProfileError(f'it is not an OrthoRank profile with "format": {FORMAT}')
    model, order = content.get("model"), content.get("order")
    if not isinstance(model, dict) or not set(SHAPE_KEYS) <= model.keys():
        raise ProfileError(f'its "model" must have {", ".join(SHAPE_KEYS)}')
    num_layers = model["num_hidden_layers"]
    if (
        not isinstance(order, list)
        or not all(type(layer) is int and 0 <= layer < num_layers for layer in order)
        or len(set(order)) != len(order)
    ):
        raise ProfileError(f'its "order" must be different layer indices below {num_layers}')
    return Profile(
        name=str(content.get("name", "unnamed")),
        model=model,
        order=tuple(order),
        measured=dict(content.get("measured") or {}),
    )
