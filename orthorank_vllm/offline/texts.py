"""What a choice of layers costs: log-probabilities of whole texts, in a worker.

Runs on the modules that vLLM loaded, whatever their dtype, quantisation or
sharding, and needs no KV cache. With the rule itself in the chosen layers it
computes what serving computes for a prompt in one chunk; the other methods
are what the rule is compared against.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from orthorank_vllm.attention.varlen import PackedTexts, VarlenAttention
from orthorank_vllm.model.adapters import base_logits
from orthorank_vllm.model.decoder import Decoder, DecoderLayer, Pick
from orthorank_vllm.model.ops import add_and_norm
from orthorank_vllm.model.stand_in import FusedStandIn
from orthorank_vllm.model.tensor_parallel import of_first_rank
from orthorank_vllm.offline.end_attention import attention_of_end
from orthorank_vllm.selection.method import LayerInput, Method
from orthorank_vllm.selection.plan import make_plan
from orthorank_vllm.selection.topk import SegmentedTopK, select

# Rows of logits at a time: a whole text's would be the largest tensor by far.
LOGIT_ROWS = 64


@dataclass(frozen=True)
class TextScore:
    """One text's scored tokens: their log-probability, and whether each was the likeliest."""

    log_prob: float
    is_greedy: bool


class Forward:
    """Some texts on their way through the layers.

    Args:
        causal_lm: vLLM's `LlamaForCausalLM` or one with the same parts.
        texts: token ids, each text from its first token.
        method: what is done in a chosen layer.
        prompt_lens: tokens of each text that are its prompt, and may be left out; None: all.
        keeps: those with which layers will be chosen.
    """

    def __init__(
        self,
        causal_lm: Any,
        texts: Sequence[Sequence[int]],
        method: Method,
        prompt_lens: Sequence[int] | None = None,
        keeps: Iterable[float] = (),
    ) -> None:
        self._causal_lm = causal_lm
        self._decoder = Decoder(causal_lm.model)
        self._method = method
        device = causal_lm.model.norm.weight.device
        self.texts = PackedTexts(texts, device, prompt_lens)
        self._attention = VarlenAttention(self.texts)
        self._plan = None
        keeps = list(dict.fromkeys(keeps))
        if not method.skips_layers:
            self._plan = make_plan(self.texts.batch, keeps, method.window, method.tail)
        if self._plan is not None:
            top_k = SegmentedTopK.of(self._plan, device)
            self._top_k = {}
            self._of_selected = {}
            for keep, quota in zip(keeps, self._plan.quotas, strict=True):
                assert quota is not None
                self._top_k[keep] = top_k.get(quota)
                self._of_selected[keep] = VarlenAttention(
                    self.texts, quota.selected_per_request, method.hides_others
                )
            requests = torch.from_numpy(self._plan.requests).to(device)
            self._sink_rows = self.texts.first_rows[requests]
            self._forced_rows = torch.from_numpy(self._plan.forced_rows).to(device)
            self._generator = torch.Generator(device).manual_seed(method.seed)

    def embed(self) -> torch.Tensor:
        """[T, hidden] residual stream that enters the first layer."""
        return self._decoder.embed(self.texts.tokens)

    def through(
        self,
        residual: torch.Tensor,
        layers: Iterable[int],
        chosen: Mapping[int, float],
        stand_ins: Mapping[int, FusedStandIn] = MappingProxyType({}),
    ) -> torch.Tensor:
        """The residual stream after `layers`; the one given is used up.

        Args:
            chosen: the keep of each chosen layer.
            stand_ins: of those that have one.
        """
        update: torch.Tensor | None = None
        for index in layers:
            layer, positions = self._decoder.layers[index], self.texts.positions
            if index in chosen and self._method.skips_layers:
                if self._method.fills_in:
                    residual = layer.replace(residual, update, stand_ins[index])
                    update = None
                continue
            if index not in chosen or self._plan is None:
                residual, update = layer.forward(self._attention, positions, residual, update)
                continue
            keep = chosen[index]
            residual, update = layer.forward(
                self._of_selected[keep],
                positions,
                residual,
                update,
                self._pick(layer, keep, stand_ins.get(index)),
                stand_in=stand_ins.get(index),
            )
        return residual if update is None else residual.add_(update)

    def _pick(self, layer: DecoderLayer, keep: float, stand_in: FusedStandIn | None) -> Pick:
        top_k = self._top_k[keep]
        if top_k is None:
            return lambda *_: self._forced_rows

        def choose(residual: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
            errors = None
            if stand_in is not None and stand_in.knows_errors:
                errors = stand_in.errors(normed)
            entering = LayerInput(
                residual,
                normed,
                self._sink_rows,
                top_k,
                self._generator,
                partial(attention_of_end, layer, self.texts, normed),
                errors,
            )
            return of_first_rank(select(self._method.score(entering), top_k))

        return choose

    def log_probs(
        self, residual: torch.Tensor, first_scored: Sequence[int]
    ) -> list[TextScore] | None:
        """Score each text's tokens from a position on.

        Args:
            residual: [T, hidden] after the last layer; used up.
            first_scored: position of the first scored token of each text, at least 1.

        Returns:
            One for each text; None in a worker that does not see the logits.
        """
        lengths = self.texts.batch.query_len.tolist()
        starts = self.texts.first_rows.tolist()
        rows = torch.cat(
            [
                torch.arange(start + first - 1, start + length - 1)
                for start, first, length in zip(starts, first_scored, lengths, strict=True)
            ]
        ).to(residual.device)
        hidden, _ = add_and_norm(self._decoder.norm, residual[rows], None)
        targets = self.texts.tokens[rows + 1]
        parts = []
        for part, target in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            logits = base_logits(self._causal_lm, part)
            if logits is None:
                continue
            logits = logits.float()
            is_likeliest = logits.gather(1, target[:, None])[:, 0] >= logits.amax(1)
            parts.append(
                torch.stack([-cross_entropy(logits, target, reduction="none"), is_likeliest])
            )
        if not parts:
            return None
        log_prob, is_greedy = torch.cat(parts, dim=1).double().cpu()
        counts = [length - first for length, first in zip(lengths, first_scored, strict=True)]
        return [
            TextScore(float(p.sum()), bool(g.all()))
            for p, g in zip(log_prob.split(counts), is_greedy.split(counts), strict=True)
        ]


def packed(lengths: Iterable[int], room_of_one: int) -> list[list[int]]:
    """Which texts go together into one forward: as many, in order, as there is room for.

    Args:
        lengths: tokens of each text.
        room_of_one: tokens of a forward; a longer text has one of its own length.

    Returns:
        indices of texts, by forward.
    """
    forwards: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if length > room:
            forwards.append([])
            room = max(room_of_one, length)
        forwards[-1].append(index)
        room -= length
    return forwards
