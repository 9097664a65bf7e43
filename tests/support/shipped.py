"""What the shipped profile makes of the real model, read from its file: it may be measured anew."""

from dataclasses import dataclass

import torch
from safetensors.torch import load_file

from orthorank_vllm.profile_store import shipped_profiles
from orthorank_vllm.profiles import Cost

# The one that is served by default.
[PROFILE] = [profile for profile in shipped_profiles() if profile.stand_in is not None]


@dataclass(frozen=True)
class Shipped:
    """Its entries from the front, until they make a ratio.

    `keeps`: of the selective layers; `listed`: these as a user sees them; `reached`: the ratio that
    they make; `expected`: what answers lose, on text that nothing was chosen on.
    """

    keeps: dict[int, float]
    reached: float
    expected: Cost

    @classmethod
    def at(cls, ratio: float) -> "Shipped":
        keeps: dict[int, float] = {}
        for entry in PROFILE.entries:
            keeps[entry.layer] = entry.keep
            skipped = sum(1 - keep for keep in keeps.values()) / PROFILE.num_layers
            if skipped > ratio - 1e-9:
                assert entry.held_back is not None
                return cls(keeps, skipped * (1 - PROFILE.share), entry.held_back)
        raise AssertionError(f"the shipped profile does not reach {ratio}")

    @property
    def stand_ins(self) -> dict[int, tuple[torch.Tensor, ...]]:
        """Of the selective layers, as `reference.Rule` has them."""
        tensors = {
            name: part.float() for name, part in load_file(str(PROFILE.stand_in_path)).items()
        }
        parts = ("down", "up", "offset", "error_direction")
        return {
            layer: tuple(tensors[name] for part in parts if (name := f"{layer}.{part}") in tensors)
            for layer in self.keeps
        }

    @property
    def listed(self) -> str:
        return ",".join(f"{layer}:{keep:.4g}" for layer, keep in self.keeps.items())

    @property
    def loses_much(self) -> bool:
        """Whether a start has to warn of it."""
        found = 1.0 if self.expected.found is None else self.expected.found
        return max(self.expected.loss.values()) > 0.1 or found < 0.95
