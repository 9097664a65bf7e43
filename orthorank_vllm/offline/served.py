"""What a served answer loses: its prompt under the rule, the answer dense, beside the dense model.

Whole texts in one forward, as in `texts`: the rows of the answer are computed in every layer, as in
decoding, over the K and V that the prompt's rows left (DESIGN: README.md, "What it costs").
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch

from orthorank_vllm.model.adapters import base_logits
from orthorank_vllm.model.ops import add_and_norm
from orthorank_vllm.model.stand_in import FusedStandIn
from orthorank_vllm.offline.texts import LOGIT_ROWS, Forward, packed
from orthorank_vllm.selection.method import Method

# In one forward: enough to keep the processor busy, little enough to stay small.
TOKENS_PER_FORWARD = 3072
# Of the dense model, at so many depths: what is above the lowest chosen layer alone is computed.
KEPT_STATES = 6


class Answered(Protocol):
    """A text as it is measured.

    Attributes:
        tokens: prompt, then answer.
        scored: spans [start, end) of tokens that count, each what is looked for as a whole.
    """

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def prompt_len(self) -> int: ...

    @property
    def scored(self) -> Sequence[tuple[int, int]]: ...


@dataclass(frozen=True)
class AnswerLoss:
    """Sums over the scored tokens of one answer, or of many.

    Attributes:
        tokens: how many are scored.
        kl: nats, KL(dense, sparse) of the next-token distributions.
        nll, dense_nll: negative log-likelihood of the tokens, sparse and dense.
        first_kl: of the first scored token of each answer.
        same: tokens for which the likeliest is that of the dense model.
        answers: how many answers this is of.
        spans, dense_found, found: spans, those of which the dense model finds every token
            likeliest, and of these those that are still found so.
    """

    tokens: int = 0
    kl: float = 0.0
    nll: float = 0.0
    dense_nll: float = 0.0
    first_kl: float = 0.0
    same: int = 0
    answers: int = 0
    spans: int = 0
    dense_found: int = 0
    found: int = 0

    def __add__(self, other: "AnswerLoss") -> "AnswerLoss":
        names = (field.name for field in fields(self))
        return AnswerLoss(*(getattr(self, name) + getattr(other, name) for name in names))


class DenseAnswers:
    """Some texts, and what the dense model makes of their answers."""

    def __init__(
        self, causal_lm: Any, texts: Sequence[Answered], method: Method, keeps: Iterable[float]
    ) -> None:
        self._causal_lm = causal_lm
        self._texts = texts
        self.forward = Forward(
            causal_lm,
            [text.tokens for text in texts],
            method,
            [text.prompt_len for text in texts],
            keeps,
        )
        self._norm = causal_lm.model.norm
        rows: list[int] = []
        targets: list[int] = []
        for text, start in zip(texts, self.forward.texts.first_rows.tolist(), strict=True):
            for first, end in text.scored:
                rows.extend(range(start + first - 1, start + end - 1))
                targets.extend(text.tokens[first:end])
        device = self.forward.texts.tokens.device
        self._rows = torch.tensor(rows, device=device)
        self._targets = torch.tensor(targets, device=device)
        num_layers = len(causal_lm.model.layers)
        residual = self.forward.embed()
        self._kept = {0: residual.clone()}
        for layer in range(num_layers):
            residual = self.forward.through(residual, [layer], {})
            if (layer + 1) % -(-num_layers // KEPT_STATES) == 0:
                self._kept[layer + 1] = residual.clone()
        self._dense = self._normed(residual)

    def below(self, layer: int) -> tuple[int, torch.Tensor]:
        """The layer that comes next, not above `layer`, and the dense states that enter it."""
        kept = max(index for index in self._kept if index <= layer)
        return kept, self._kept[kept].clone()

    def losses_of_dense(self) -> list[AnswerLoss] | None:
        """Compare the dense model with itself; see `losses`."""
        return self._compared(self._dense)

    def losses(self, residual: torch.Tensor) -> list[AnswerLoss] | None:
        """Compare with the dense model's answers.

        Args:
            residual: [T, hidden] after the last layer; used up.

        Returns:
            One for each text; None in a worker that does not see the logits.
        """
        return self._compared(self._normed(residual))

    def _compared(self, hidden: torch.Tensor) -> list[AnswerLoss] | None:
        columns = []
        for dense, sparse, targets in zip(
            self._dense.split(LOGIT_ROWS),
            hidden.split(LOGIT_ROWS),
            self._targets.split(LOGIT_ROWS),
            strict=True,
        ):
            # The other ranks' logits come from these two too: no answer before both.
            of_dense = base_logits(self._causal_lm, dense)
            of_sparse = base_logits(self._causal_lm, sparse)
            if of_dense is None or of_sparse is None:
                continue
            columns.append(_compare(of_dense.float(), of_sparse.float(), targets))
        if not columns:
            return None
        return self._by_text(torch.cat(columns, dim=1).double().cpu())

    def _normed(self, residual: torch.Tensor) -> torch.Tensor:
        return add_and_norm(self._norm, residual.index_select(0, self._rows), None)[0]

    def _by_text(self, columns: torch.Tensor) -> list[AnswerLoss]:
        found = []
        lengths = [sum(end - first for first, end in text.scored) for text in self._texts]
        for text, part in zip(self._texts, columns.split(lengths, dim=1), strict=True):
            kl, nll, dense_nll, same, is_hit, is_dense_hit = part
            sizes = [end - first for first, end in text.scored]
            of_dense = [bool(span.all()) for span in is_dense_hit.split(sizes)]
            of_sparse = [bool(span.all()) for span in is_hit.split(sizes)]
            found.append(
                AnswerLoss(
                    tokens=part.shape[1],
                    kl=float(kl.sum()),
                    nll=float(nll.sum()),
                    dense_nll=float(dense_nll.sum()),
                    first_kl=float(kl[0]),
                    same=int(same.sum()),
                    answers=1,
                    spans=len(sizes),
                    dense_found=sum(of_dense),
                    found=sum(a and b for a, b in zip(of_dense, of_sparse, strict=True)),
                )
            )
        return found


def _compare(dense: torch.Tensor, sparse: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[6, rows]: KL, the targets' negative log-likelihoods, and what is likeliest in both."""
    dense, sparse = dense.log_softmax(-1), sparse.log_softmax(-1)
    kl = (dense.exp() * (dense - sparse)).sum(-1)
    of_target = [-each.gather(1, targets[:, None])[:, 0] for each in (sparse, dense)]
    likeliest, dense_likeliest = sparse.argmax(-1), dense.argmax(-1)
    return torch.stack(
        [
            kl,
            *of_target,
            likeliest == dense_likeliest,
            likeliest == targets,
            dense_likeliest == targets,
        ]
    )


class ServedStep:
    """Trials with some layers chosen already: those in ascending order share the part below.

    Each group of texts goes through all layers before the next does: what they hold on the way,
    far more than their residual streams, is held once.
    """

    def __init__(
        self,
        groups: Sequence[DenseAnswers],
        chosen: Mapping[int, float],
        num_layers: int,
        stand_ins: Mapping[int, FusedStandIn] = MappingProxyType({}),
    ) -> None:
        self._groups = groups
        self._chosen = chosen
        self._num_layers = num_layers
        self._stand_ins = stand_ins
        self._below: list[torch.Tensor] = []
        self._next_layer = 0

    def losses_with(self, more: Mapping[int, float]) -> list[AnswerLoss] | None:
        """Each text's loss with `more` layers chosen as well.

        Args:
            more: the keep of each; the lowest not below that of the call before.
        """
        chosen = {**self._chosen, **more}
        if not self._below:
            self._start(min(chosen, default=self._num_layers))
        lowest = min(more, default=self._next_layer)
        assert lowest >= self._next_layer, "layers are tried in ascending order"
        passed, above = range(self._next_layer, lowest), range(lowest, self._num_layers)
        losses: list[AnswerLoss] = []
        is_told = True
        for index, group in enumerate(self._groups):
            through = partial(group.forward.through, stand_ins=self._stand_ins)
            self._below[index] = through(self._below[index], passed, self._chosen)
            residual = through(self._below[index].clone(), above, chosen)
            found = group.losses(residual)
            is_told &= found is not None
            losses.extend(found or ())
        self._next_layer = lowest
        return losses if is_told else None

    def _start(self, lowest: int) -> None:
        """Begin with the dense model's states where they are kept, below `lowest`."""
        for group in self._groups:
            self._next_layer, residual = group.below(lowest)
            self._below.append(residual)


def groups_of(texts: Sequence[Answered]) -> list[list[Answered]]:
    """The texts in order, as many together as make a good forward."""
    forwards = packed((len(text.tokens) for text in texts), TOKENS_PER_FORWARD)
    return [[texts[index] for index in indices] for indices in forwards]
