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

from orthorank_vllm.attention.varlen import PackedTexts, SelectedRows
from orthorank_vllm.model.decoder import Decoder, DecoderLayer
from orthorank_vllm.model.kernels import add_and_norm
from orthorank_vllm.model.tensor_parallel import of_first_rank
from orthorank_vllm.selection.method import Treatment
from orthorank_vllm.selection.plan import make_plan
from orthorank_vllm.selection.topk import Competition, score, select

# Rows of logits at a time: a whole text's would be the largest tensor by far.
LOGIT_ROWS = 64


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
        self._decoder = Decoder(causal_lm.model)
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
        return self._decoder.embed(self.texts.tokens)

    def through(
        self, stream: torch.Tensor, layers: Iterable[int], chosen: frozenset[int]
    ) -> torch.Tensor:
        """The residual stream after `layers`; the one given is used up."""
        for index in layers:
            layer = self._decoder.layers[index]
            if index not in chosen:
                stream = self._dense(layer, stream)
            elif self._treatment.selects_tokens:
                stream = self._selective(layer, stream)
        return stream

    def _dense(self, layer: DecoderLayer, stream: torch.Tensor) -> torch.Tensor:
        normed, _ = add_and_norm(layer.input_norm, stream, None)
        query, key, value = self._project(layer, normed)
        delta = layer.after_attention(self.texts.attend(layer.attn.attn, query, key, value))
        normed, stream = add_and_norm(layer.post_norm, stream, delta)
        return stream.add_(layer.after_feed_forward(normed))

    def _selective(self, layer: DecoderLayer, stream: torch.Tensor) -> torch.Tensor:
        if self._plan is None:
            return self._dense(layer, stream)
        normed, _ = add_and_norm(layer.input_norm, stream, None)
        indices = of_first_rank(select(self._scores(stream, normed), self._competition))
        rows = SelectedRows(self._plan, indices)
        query, key, value = self._project(layer, normed)
        visible = None
        if self._treatment.forgets_unselected:
            visible = torch.zeros(len(stream), dtype=torch.bool, device=stream.device)
            visible[indices] = True
            visible[self.texts.first_rows] = True  # without the sink no attention works
        attended = self.texts.attend_from(
            layer.attn.attn, rows, query[indices], key, value, visible
        )
        delta = layer.after_attention(attended)
        normed, updated = add_and_norm(layer.post_norm, stream[indices], delta)
        return stream.index_copy_(0, indices, updated.add_(layer.after_feed_forward(normed)))

    def _project(
        self, layer: DecoderLayer, normed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attn = layer.attn
        qkv, _ = attn.qkv_proj(normed)
        query, key, value = qkv.split([attn.q_size, attn.kv_size, attn.kv_size], dim=-1)
        # Copies: the split is of one tensor, and padding wants rows by themselves.
        query, key = layer.queries_and_keys(
            self.texts.positions, query.contiguous(), key.contiguous()
        )
        return query, key, value.contiguous()

    def _scores(self, stream: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        states = normed if self._treatment.scores_normed else stream
        if self._treatment.is_random:
            return torch.rand(
                len(self._competition.candidates), generator=self._random, device=stream.device
            )
        scores = score(states, states[self.texts.first_rows], self._competition)
        return scores.max() - scores if self._treatment.prefers_aligned else scores

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
        hidden, _ = add_and_norm(self._decoder.norm, stream[rows], None)
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
