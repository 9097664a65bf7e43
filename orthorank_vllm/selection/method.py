"""What is done in the chosen layers: the rule. Methods that it is measured against override it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from orthorank_vllm.options import DEFAULT_TAIL, DEFAULT_WINDOW
from orthorank_vllm.selection.topk import SegmentedTopK, score, score_errors


@dataclass(frozen=True)
class LayerInput:
    """What enters a layer, for a method to score.

    Attributes:
        residual, normed: [tokens, hidden], the residual stream and the layer's norm of it.
        first_rows: [R] int64, where position 0 is of each text that has candidates.
        generator: of one forward; for methods that draw.
        end_attention: tells what attention each token gets from its prompt's end, [tokens] float32.
        errors: [tokens] float32, by how much a stand-in is expected to miss each token's update,
            a logarithm; None where that is not known.
    """

    residual: torch.Tensor
    normed: torch.Tensor
    first_rows: torch.Tensor
    top_k: SegmentedTopK
    generator: torch.Generator
    end_attention: Callable[[], torch.Tensor]
    errors: torch.Tensor | None = None


@dataclass(frozen=True)
class Method:
    """The selection rule.

    Attributes:
        name, description: for the user.
        skips_layers: a chosen layer is left out altogether, and no token is scored.
        fills_in: what is left out is replaced by a stand-in, for every token.
        hides_others: tokens that are not selected leave no K and V.
        seed: of `LayerInput.generator`.
    """

    name: ClassVar[str] = "orthorank"
    description: ClassVar[str] = "the selection rule"
    skips_layers: ClassVar[bool] = False
    fills_in: ClassVar[bool] = False
    hides_others: ClassVar[bool] = False

    window: int = DEFAULT_WINDOW
    tail: int = DEFAULT_TAIL
    seed: int = 0

    def score(self, entering: LayerInput) -> torch.Tensor:
        """Score every candidate, [C] float32, not negative; lower is more important."""
        if entering.errors is not None:
            return score_errors(entering.errors, entering.top_k.candidates)
        return self.score_by_sink(entering)

    def score_by_sink(self, entering: LayerInput) -> torch.Tensor:
        """As it is done where no stand-in's errors are known."""
        sinks = entering.residual[entering.first_rows]
        return score(entering.residual, sinks, entering.top_k)
