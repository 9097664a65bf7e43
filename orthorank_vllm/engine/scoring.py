"""What a choice of layers costs: log-probabilities of whole texts, in a worker.

Runs on the modules that vLLM loaded, whatever their dtype, quantisation or
sharding, and needs no KV cache. With the rule itself in the chosen layers it
computes what serving computes for a prompt in one chunk; the other treatments
are what the rule is compared against.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from orthorank_vllm.engine.kernels import add_and_norm, mlp, rotate
from orthorank_vllm.engine.packing import PackedTexts, SelectedRows
from orthorank_vllm.plan import make_plan
from orthorank_vllm.selection import Competition, score, select
from orthorank_vllm.treatment import Treatment

# Rows of logits at a time: a whole text's would be the largest tensor by far.
LOGIT_ROWS = 256


@dataclass(frozen=True)
class TextScore:
    """Of one text's scored tokens: their log-probability, and whether each was the likeliest."""

    log_prob: float
    is_greedy: bool


class Forward:
    """Some texts on their way through the layers.

    Args:
        causal_lm: vLLM's `LlamaForCausalLM` or one with the same parts.
        texts: token ids, each text from its first token.
        treatment: what is done in a chosen layer.
    """

    def __init__(
        self, causal_lm: Any, texts: Sequence[Sequence[int]], treatment: Treatment
    ) -> None:
        self._causal_lm = causal_lm
        self._layers = causal_lm.model.layers
        self._treatment = treatment
        device = causal_lm.model.norm.weight.device
        self.texts = PackedTexts(texts, device)
        self._plan = None
        if treatment.selects_tokens:
            self._plan = make_plan(self.texts.batch, treatment.keep, treatment.window)
        if self._plan is not None:
            self._competition = Competition.of(self._plan, device)
            self._random = torch.Generator(device).manual_seed(treatment.seed)

    def embed(self) -> torch.Tensor:
        """[T, hidden] residual stream that enters the first layer."""
        stream: torch.Tensor = self._causal_lm.model.embed_input_ids(self.texts.tokens)
        return stream

    def through(
        self, stream: torch.Tensor, layers: Iterable[int], chosen: frozenset[int]
    ) -> torch.Tensor:
        """The residual stream after `layers`; the one given is used up."""
        for index in layers:
            if index not in chosen:
                stream = self._dense(self._layers[index], stream)
            elif self._treatment.selects_tokens:
                stream = self._selective(self._layers[index], stream)
        return stream

    def _dense(self, layer: Any, stream: torch.Tensor) -> torch.Tensor:
        normed, _ = add_and_norm(layer.input_layernorm, stream, None)
        attn = layer.self_attn
        query, key, value = self._project(attn, normed)
        output, _ = attn.o_proj(self.texts.attend(attn.attn, query, key, value))
        normed, stream = add_and_norm(layer.post_attention_layernorm, stream, output)
        return stream.add_(mlp(layer.mlp, normed))

    def _selective(self, layer: Any, stream: torch.Tensor) -> torch.Tensor:
        if self._plan is None:
            return self._dense(layer, stream)
        normed, _ = add_and_norm(layer.input_layernorm, stream, None)
        indices = select(self._scores(stream, normed), self._competition)
        rows = SelectedRows(self._plan, indices)
        attn = layer.self_attn
        query, key, value = self._project(attn, normed)
        visible = None
        if self._treatment.forgets_unselected:
            visible = torch.zeros(len(stream), dtype=torch.bool, device=stream.device)
            visible[indices] = True
            visible[self.texts.first_rows] = True  # without the sink no attention works
        attended = self.texts.attend_from(attn.attn, rows, query[indices], key, value, visible)
        output, _ = attn.o_proj(attended)
        normed, updated = add_and_norm(layer.post_attention_layernorm, stream[indices], output)
        return stream.index_copy_(0, indices, updated.add_(mlp(layer.mlp, normed)))

    def _project(
        self, attn: Any, normed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        qkv, _ = attn.qkv_proj(normed)
        query, key, value = qkv.split([attn.q_size, attn.kv_size, attn.kv_size], dim=-1)
        # Copies: the split is of one tensor, and padding wants rows by themselves.
        query = rotate(attn.rotary_emb, self.texts.positions, query.contiguous())
        key = rotate(attn.rotary_emb, self.texts.positions, key.contiguous())
        return query, key, value.contiguous()

    def _scores(self, stream: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        states = normed if self._treatment.scores_normed else stream
        if self._treatment.is_random:
            return torch.rand(
                len(self._competition.candidates), generator=self._random, device=stream.device
            )
        scores = score(states, states[self.texts.first_rows], self._competition)
        return (1 - scores).clamp_(min=0) if self._treatment.prefers_aligned else scores

    def log_probs(
        self, stream: torch.Tensor, first_scored: Sequence[int]
    ) -> list[TextScore] | None:
        """Score each text's tokens from a position on.

        Args:
            stream: [T, hidden] after the last layer; used up.
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
        ).to(stream.device)
        hidden, _ = add_and_norm(self._causal_lm.model.norm, stream[rows], None)
        targets = self.texts.tokens[rows + 1]
        parts = []
        for part, target in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            logits = self._causal_lm.compute_logits(part)
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
