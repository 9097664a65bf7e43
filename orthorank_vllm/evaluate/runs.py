"""What is measured: each method with its layers, and what came of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from orthorank_vllm.config import ratio_of
from orthorank_vllm.evaluate.methods import METHODS, Prune
from orthorank_vllm.options import LayerKeep

if TYPE_CHECKING:
    from orthorank_vllm.offline.served import AnswerLoss

DENSE = "dense"
LOOK_UP = "look-up"

Layers = tuple[LayerKeep, ...]


@dataclass(frozen=True)
class KindLoss:
    """What answers lose on one kind of text.

    Attributes:
        answers, tokens: how many were measured.
        nats, dense_nats: negative log-likelihood per answer token, here and dense.
        kl, first_kl: nats, KL(dense, this) per answer token, and of each answer's first.
        same: share of tokens for which the likeliest is that of the dense model.
        dense_found, found: share of the numbers that the dense model finds, and of these those
            that are found here; None where there are none.
    """

    answers: int
    tokens: int
    nats: float
    dense_nats: float
    kl: float
    first_kl: float
    same: float
    dense_found: float | None = None
    found: float | None = None

    @property
    def added(self) -> float:
        """Nats per answer token more than dense."""
        return self.nats - self.dense_nats

    @classmethod
    def of(cls, kind: str, losses: "Sequence[AnswerLoss]") -> "KindLoss":
        """The means of many answers, at least one."""
        total = sum(losses[1:], losses[0])
        is_look_up = kind == LOOK_UP
        return cls(
            answers=total.answers,
            tokens=total.tokens,
            nats=total.nll / total.tokens,
            dense_nats=total.dense_nll / total.tokens,
            kl=total.kl / total.tokens,
            first_kl=total.first_kl / total.answers,
            same=total.same / total.tokens,
            dense_found=total.dense_found / total.spans if is_look_up else None,
            found=total.found / total.dense_found if is_look_up and total.dense_found else None,
        )


@dataclass(frozen=True)
class Run:
    """One method with some layers, and what was measured of it so far.

    Attributes:
        ratio_asked, ratio: as given, and reached with whole layers.
        layers: each with its keep, in the profile's order.
        served: what answers lose, by length of prompt and kind of text.
        perplexity: of the whole text.
        tasks: by task, "acc", "stderr", "questions" and perhaps "acc_norm".
    """

    method: str
    ratio_asked: float
    ratio: float
    layers: Layers
    served: dict[int, dict[str, KindLoss]] = field(default_factory=dict)
    perplexity: float | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.method if self.method == DENSE else f"{self.method} {self.ratio_asked:.3g}"

    @property
    def chosen(self) -> dict[int, float]:
        """The keep of each layer."""
        return dict(self.layers)

    def is_like(self, other: "Run") -> bool:
        return (self.method, set(self.layers)) == (other.method, set(other.layers))

    def loss(self, length: int, kind: str) -> KindLoss | None:
        """What answers lose to prompts of a length, if that was measured."""
        return self.served.get(length, {}).get(kind)

    def with_loss(self, length: int, kind: str, loss: KindLoss) -> "Run":
        """A copy that holds one more loss."""
        of_length = {**self.served.get(length, {}), kind: loss}
        return replace(self, served={**self.served, length: of_length})


def plan_runs(
    methods: Iterable[str],
    has_dense: bool,
    chosen: Mapping[float, Layers],
    pruned: Mapping[str, Mapping[float, Layers]],
    num_layers: int,
    stand_in_share: float = 0.0,
) -> list[Run]:
    """Every method at every ratio, but those that would only repeat the rule.

    Args:
        has_dense: whether to begin with the dense model.
        chosen: the layers of all methods that do not prune, by the ratio asked for.
        stand_in_share: see `Profile.share`.
        pruned: those of each that does, by the same ratios.
    """
    runs = [Run(DENSE, 0, 0, ())] if has_dense else []
    for ratio, layers in chosen.items():
        for method in methods:
            own = pruned[method][ratio] if method in pruned else layers
            if not repeats_the_rule(method, own):
                share = 0.0 if method == Prune.name else stand_in_share
                runs.append(Run(method, ratio, ratio_of(own, num_layers, share), own))
    return runs


def repeats_the_rule(name: str, layers: Layers) -> bool:
    """Whether a rival only chooses other tokens, where no layer chooses any."""
    method = METHODS[name]
    only_chooses = name != "orthorank" and not (method.skips_layers or method.hides_others)
    return only_chooses and not any(keep for _, keep in layers)
