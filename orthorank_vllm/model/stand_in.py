"""The stand-in: a linear map of low rank, in place of the update that a layer spares its tokens.

From a token's normalised state to what the layer would have added to its residual stream
(DESIGN: README.md, "The stand-in"). Maps are kept in a safetensors file beside their profile.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from orthorank_vllm.files import write_whole
from orthorank_vllm.options import STAND_IN

# In a file, whatever the model's: half of float32's size, and finer than bfloat16.
STORED_DTYPE = torch.float16
PARTS = ("down", "up", "offset", "error_direction")


@dataclass(frozen=True)
class StandIn:
    """One layer's map, `normed @ down @ up + offset`.

    Attributes:
        down: [hidden, rank].
        up: [rank, hidden].
        offset: [hidden].
        error_direction: [hidden], `normed @ error_direction` is the larger the more a token's
            update is missed by; None where that is not known.
    """

    down: torch.Tensor
    up: torch.Tensor
    offset: torch.Tensor
    error_direction: torch.Tensor | None = None

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """What there is of it, by name."""
        return {part: found for part in PARTS if (found := getattr(self, part)) is not None}

    @property
    def rank(self) -> int:
        """Columns of the narrow side."""
        return self.down.shape[1]

    def to(self, device: torch.device, dtype: torch.dtype) -> "StandIn":
        """A copy on a device, of a dtype."""
        return StandIn(**{name: part.to(device, dtype) for name, part in self.parts.items()})

    def fused(self, device: torch.device, dtype: torch.dtype) -> "FusedStandIn":
        """The map as it is added, on a device, of a dtype."""
        down = torch.cat([self.down, torch.zeros_like(self.down[:, :1])], dim=1)
        one = torch.zeros(self.rank + 1)
        one[-1] = 1
        up = torch.cat([self.up, self.offset[None]])
        direction = self.error_direction
        return FusedStandIn(
            down=down.to(device, dtype),
            one=one.to(device, dtype),
            up=up.to(device, dtype),
            error_direction=None if direction is None else direction.to(device, torch.float32),
        )


@dataclass(frozen=True)
class FusedStandIn:
    """One layer's map in two products, its offset one more row of the second.

    Attributes:
        down: [hidden, rank + 1], its last column 0.
        one: [rank + 1], 0 but for the last.
        up: [rank + 1, hidden].
        error_direction: as `StandIn` has it, in float32.
    """

    down: torch.Tensor
    one: torch.Tensor
    up: torch.Tensor
    error_direction: torch.Tensor | None = None

    def to(self, device: torch.device) -> "FusedStandIn":
        """A copy on a device."""
        direction = self.error_direction
        return FusedStandIn(
            down=self.down.to(device),
            one=self.one.to(device),
            up=self.up.to(device),
            error_direction=None if direction is None else direction.to(device),
        )

    @property
    def rank(self) -> int:
        """Columns of the narrow side, the offset's among them."""
        return self.down.shape[1]

    @property
    def knows_errors(self) -> bool:
        """Whether it is known which updates it misses most."""
        return self.error_direction is not None

    def errors(self, normed: torch.Tensor) -> torch.Tensor:
        """By how much each row's update is expected to be missed: [tokens] float32, a logarithm."""
        assert self.error_direction is not None
        return normed.float().mv(self.error_direction)

    def add_to(self, residual: torch.Tensor, normed: torch.Tensor) -> None:
        """Add the map to every row of the residual stream, in place.

        Args:
            residual: [tokens, hidden].
            normed: [tokens, hidden], the layer's norm of it.
        """
        residual.addmm_(torch.addmm(self.one, normed, self.down), self.up)


def write_stand_ins(
    path: Path, stand_ins: Mapping[int, StandIn], metadata: Mapping[str, str]
) -> None:
    """Write maps, whole or not at all.

    Args:
        stand_ins: by layer; kept as `STORED_DTYPE`.
        metadata: what they were fitted on.

    Raises:
        OSError: nothing was changed.
    """
    from safetensors.torch import save

    tensors = {
        f"{layer}.{name}": part.to("cpu", STORED_DTYPE).contiguous()
        for layer, stand_in in stand_ins.items()
        for name, part in stand_in.parts.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(tensors, dict(metadata)))


def read_metadata(path: Path) -> dict[str, str]:
    """What `write_stand_ins` was told.

    Raises:
        OSError, safetensors.SafetensorError: missing, or no such file.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata() or {})


def read_stand_ins(path: str | Path, layers: Iterable[int]) -> dict[int, StandIn]:
    """The maps of those of the layers that have one, on the host.

    Raises:
        OSError, safetensors.SafetensorError: missing, or no such file.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        names = set(file.keys())
        # Of a broken file a part may be missing, which `get_tensor` says.
        needed = set(PARTS[:3])
        return {
            layer: StandIn(
                **{
                    part: file.get_tensor(f"{layer}.{part}")
                    for part in PARTS
                    if part in needed or f"{layer}.{part}" in names
                }
            )
            for layer in layers
            if f"{layer}.down" in names
        }


def _check(layer: int, stand_in: StandIn, hidden_size: int) -> None:
    """Raise a `ValueError` for a map that could not be added, or would make no numbers."""
    down = stand_in.down
    if down.ndim == 2 and len(down) != hidden_size:
        raise ValueError(f"it is of a model with {len(down)} channels")
    rank = down.shape[-1] if down.ndim else 0
    shapes = {"down": (hidden_size, rank), "up": (rank, hidden_size)}
    for name, part in stand_in.parts.items():
        if part.shape != shapes.get(name, (hidden_size,)) or not part.is_floating_point():
            raise ValueError(f"{layer}.{name} is {part.dtype} of shape {tuple(part.shape)}")
        if not part.isfinite().all():
            raise ValueError(f"{layer}.{name} holds what is no number")


def stand_ins_to_add(
    path: str | Path, layers: Iterable[int], hidden_size: int, dtype: torch.dtype
) -> dict[int, FusedStandIn]:
    """Maps as they are added, still on the host.

    What is on a device when a model is loaded, vLLM discards with its weights in a deep sleep.

    Raises:
        OptionError: the file is none, or of another model.
    """
    from safetensors import SafetensorError

    try:
        found = read_stand_ins(path, layers)
        for layer, stand_in in found.items():
            _check(layer, stand_in, hidden_size)
    except (OSError, ValueError, SafetensorError) as error:
        raise STAND_IN.rejected(str(path), f"this worker cannot use it ({error})") from None
    host = torch.device("cpu")
    return {layer: stand_in.fused(host, dtype) for layer, stand_in in found.items()}
