"""What is done in the chosen layers: the rule, and what it is measured against."""

from dataclasses import dataclass

from orthorank_vllm.options import DEFAULT_KEEP, DEFAULT_WINDOW

METHODS = {
    "orthorank": "the selection rule",
    "prune": "the layer is left out",
    "random": "as many tokens in each window, drawn at random",
    "normed": "scored on the layer's normalised input, learned weight included",
    "aligned": "the tokens most aligned with the sink instead of the least",
    "forget": "tokens that are not selected leave no K and V, the sink apart",
}


@dataclass(frozen=True)
class Treatment:
    """One method of `METHODS` with its parameters; `seed` is for the random one."""

    method: str = "orthorank"
    keep: float = DEFAULT_KEEP
    window: int = DEFAULT_WINDOW
    seed: int = 0

    @property
    def selects_tokens(self) -> bool:
        return self.method != "prune"

    @property
    def is_random(self) -> bool:
        return self.method == "random"

    @property
    def scores_normed(self) -> bool:
        return self.method == "normed"

    @property
    def prefers_aligned(self) -> bool:
        return self.method == "aligned"

    @property
    def forgets_unselected(self) -> bool:
        return self.method == "forget"

    @property
    def saved_per_layer(self) -> float:
        """Fraction of a chosen layer's token updates that are saved."""
        return 1 - self.keep if self.selects_tokens else 1.0
