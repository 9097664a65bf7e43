"""OrthoRank prefill, written out plainly: what the vLLM plugin is compared against.

In a selective layer only some of the prompt's tokens are updated: the first, the last few, and of
what is between, per window of positions, those whose residual stream is the most orthogonal to that
of the request's first token, the attention sink. All tokens, updated or not, leave K and V behind.
A token that is not updated may get what a linear map makes of its normalised state instead.
(OrthoRank: Shin, Oh, Oh, ICML 2025, arXiv 2507.03865.)

A float32 implementation on the modules of transformers' Llama and the families like it; it shares
no code with `orthorank_vllm`. A request is computed by a sequence of forwards, each over positions
[start, end), so that chunked prefill, prefix-cache hits, preemption and decode can all be replayed.

Shapes: T = tokens of a forward, Q = those updated, S = positions in the cache, H / G = query /
key-value heads, D = head size.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@dataclass(frozen=True)
class Rule:
    """Which layers are selective (none: a dense model) and how tokens compete in them."""

    layers: Mapping[int, float]  # the selective ones, and the keep of each; 0: nothing competes
    window: int = 128  # 0: the whole prompt is one window
    tail: int = 64  # last tokens of the prompt that are always updated
    # By layer: for tokens that are not updated x, normalised, gives x @ first @ second + third.
    # Where there is a fourth, the largest x @ fourth are updated, whatever their sink.
    stand_ins: Mapping[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    cache_dtype: torch.dtype | None = None  # of K and V, 8 bits; None: as computed

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Rule":
        """That of a user's options, the layers as pairs of layer and keep."""
        rule = {name: value for name, value in options.items() if name != "aligned"}
        return cls(**{**rule, "layers": dict(options["layers"])})

    @property
    def options(self) -> dict[str, Any]:
        """The same for a user to give, for chunks that end anywhere."""
        pairs = [list(pair) for pair in self.layers.items()]
        return {"layers": pairs, "window": self.window, "tail": self.tail, "aligned": "off"}


def with_stand_ins(
    rule: Rule, hidden_size: int, rank: int = 8, knows_errors: Collection[int] = ()
) -> Rule:
    """The rule with maps of random numbers, which change every state by about a third.

    `knows_errors`: layers whose tokens are chosen by a stand-in's expected error.
    """
    numbers = torch.Generator().manual_seed(3)

    def drawn(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=numbers) * scale

    maps = {
        layer: (
            drawn(hidden_size, rank, scale=hidden_size**-0.5),
            drawn(rank, hidden_size, scale=0.3 * rank**-0.5),
            drawn(hidden_size, scale=0.1),
            *([drawn(hidden_size, scale=hidden_size**-0.5)] if layer in knows_errors else ()),
        )
        for layer in rule.layers
    }
    return replace(rule, stand_ins=maps)


class Reference:
    """The model's arithmetic: one layer's K and V, and one layer's update of some of its tokens."""

    def __init__(self, model: PreTrainedModel, rule: Rule) -> None:
        if model.dtype != torch.float32:
            raise ValueError(f"load the model with dtype=torch.float32, not {model.dtype}")
        if not rule.layers.keys() <= set(range(len(model.model.layers))):
            raise ValueError(f"{rule.layers}: the model has {len(model.model.layers)} layers")
        self.model: Any = model.eval()
        self.layers: list[Any] = list(model.model.layers)
        self.head_size: int = self.layers[0].self_attn.head_dim
        self.rule = rule
        # In Mistral and some Mixtrals a query sees only this many positions, its own included.
        self.sliding_window: int | None = getattr(model.config, "sliding_window", None) or None
        # Granite's, after muP: of the embeddings, of what a layer adds, of the logits.
        self.embedding_scale: float = getattr(model.config, "embedding_multiplier", 1.0)
        self.residual_scale: float = getattr(model.config, "residual_multiplier", 1.0)
        self.logits_scale: float = 1 / getattr(model.config, "logits_scaling", 1.0)

    def start(self, prompt: Sequence[int]) -> "Request":
        return Request(self, prompt)

    def embed(self, tokens: list[int]) -> torch.Tensor:
        hidden: torch.Tensor = self.model.model.embed_tokens(
            torch.tensor(tokens, device=self.model.device)
        )
        return hidden * self.embedding_scale

    def keys_values(
        self, layer: Any, normed: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K, rotated, and V [G, T, D] of `normed` [T, hidden] at `positions` [T]."""
        keys = self._project(layer.self_attn, "k", normed)
        values = self._project(layer.self_attn, "v", normed)
        keys = self._rotate(keys, positions)
        if self.rule.cache_dtype is not None:
            keys, values = (_towards_zero(each, self.rule.cache_dtype) for each in (keys, values))
        return keys, values

    def update(
        self,
        layer: Any,
        hidden: torch.Tensor,
        normed: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """The residual stream after `layer`, for the tokens given.

        `hidden`, `normed` [Q, hidden] and `positions` [Q] are the tokens', in any selection;
        `keys`, `values` [G, S, D] are those of positions 0 to S - 1.
        """
        attention = layer.self_attn
        queries = self._rotate(self._project(attention, "q", normed), positions)
        group = queries.shape[0] // keys.shape[0]
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)

        distance = positions[:, None] - torch.arange(keys.shape[1], device=positions.device)
        visible = distance >= 0
        if self.sliding_window is not None:
            visible &= distance < self.sliding_window
        scores = queries @ keys.transpose(1, 2) * attention.scaling  # [H, Q, S]
        weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
        attended = (weights @ values).transpose(0, 1).flatten(1)  # [Q, H * D]

        hidden = hidden + self.residual_scale * attention.o_proj(attended)
        feed_forward = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
        # Mixtral's MoE block insists on a batch dimension.
        change: torch.Tensor = feed_forward(layer.post_attention_layernorm(hidden)[None])[0]
        return hidden + self.residual_scale * change

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, vocabulary] of the residual stream after the last layer."""
        logits: torch.Tensor = self.model.lm_head(self.model.model.norm(hidden))
        return logits * self.logits_scale

    @torch.no_grad()
    def sink(self, token: int) -> dict[int, torch.Tensor]:
        """Per selective layer the sink's h_0 [hidden]; it depends on nothing but the token's id.

        Position 0 sees only itself, and every layer updates it.
        """
        hidden = self.embed([token])
        position = torch.tensor([0], device=hidden.device)
        sinks: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(self.layers):
            if index in self.rule.layers:
                sinks[index] = hidden[0].clone()
            normed = layer.input_layernorm(hidden)
            keys, values = self.keys_values(layer, normed, position)
            hidden = self.update(layer, hidden, normed, position, keys, values)
        return sinks

    def _project(self, attention: Any, kind: str, normed: torch.Tensor) -> torch.Tensor:
        """Queries "q", keys "k" or values "v", [heads, T, D]."""
        if hasattr(attention, "qkv_proj"):  # Phi-3 keeps all three in one
            config = self.model.config
            counts = [config.num_attention_heads, *[config.num_key_value_heads] * 2]
            parts = attention.qkv_proj(normed).split([n * self.head_size for n in counts], dim=-1)
            projected = parts["qkv".index(kind)]
        else:
            projected = getattr(attention, f"{kind}_proj")(normed)
        heads = projected.unflatten(-1, (-1, self.head_size))
        norm = getattr(attention, f"{kind}_norm", None)  # Qwen3, of each head
        return (heads if norm is None else norm(heads)).transpose(0, 1)

    def _rotate(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self.model.model.rotary_emb(heads, positions[None])
        # Some of Phi-3's models rotate only the first part of each head.
        turned, rest = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
        # It rotates a query and a key at once; here they are not of the same tokens.
        turned = apply_rotary_pos_emb(turned[None], turned[None], cos, sin)[0][0]
        return torch.cat([turned, rest], dim=-1)


def _towards_zero(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest numbers of an 8-bit type that are not larger: what vLLM's CPU kernel stores."""
    stored = torch.arange(128, dtype=torch.uint8).view(dtype).float()
    stored = stored[stored.isfinite()]
    below = torch.searchsorted(stored, numbers.abs().contiguous(), right=True) - 1
    return stored[below] * numbers.sign()


class Request:
    """One sequence: its tokens, the K and V computed so far, and what was selected on the way."""

    def __init__(self, reference: Reference, prompt: Sequence[int]) -> None:
        if not prompt:
            raise ValueError("an empty prompt")
        self.reference = reference
        self.tokens = list(prompt)
        self.prompt_len = len(prompt)
        # Smallest gap so far between the last selected and the first unselected candidate: where it
        # is within float noise, another correct implementation may choose otherwise.
        self.margin = math.inf
        # (layer, start of the forward) -> positions updated, ascending. A forward that starts where
        # an earlier one did, as after restart(), replaces its entries.
        self.selected: dict[tuple[int, int], list[int]] = {}
        # Prompt tokens x layers, everything computed so far, recomputation included.
        self.updates = 0
        self.skipped = 0
        self.computed = 0  # positions 0 to computed - 1 have K and V
        # Of the last forward: what entered each layer [T, hidden], and what left the last one.
        self.streams: list[torch.Tensor] = []
        # Per layer K and V [G, computed, D]; never written in place, so that forks can share them.
        heads, size = reference.model.config.num_key_value_heads, reference.head_size
        nothing = torch.empty(heads, 0, size, device=reference.model.device)
        self._cache = [(nothing, nothing) for _ in reference.layers]
        self._sinks: dict[int, torch.Tensor] = {}  # what Reference.sink() says, once it was needed

    def append(self, token: int) -> None:
        """Adds a generated token; a forward still has to compute it."""
        self.tokens.append(token)

    @torch.no_grad()
    def forward(self, start: int, end: int) -> torch.Tensor:
        """Computes positions [start, end) on top of [0, start); log-probabilities [T, vocab]."""
        if not (0 <= start <= self.computed and start < end <= len(self.tokens)):
            raise ValueError(
                f"[{start}, {end}): {self.computed} computed of {len(self.tokens)} tokens"
            )
        hidden = self.reference.embed(self.tokens[start:end])
        positions = torch.arange(start, end, device=hidden.device)
        self.streams = []
        for index, layer in enumerate(self.reference.layers):
            self.streams.append(hidden.clone())
            normed = layer.input_layernorm(hidden)
            new_keys, new_values = self.reference.keys_values(layer, normed, positions)
            keys = torch.cat([self._cache[index][0][:, :start], new_keys], dim=1)
            values = torch.cat([self._cache[index][1][:, :start], new_values], dim=1)
            self._cache[index] = keys, values

            updated = list(range(start, end))
            if index in self.reference.rule.layers:
                updated = self._select(index, hidden, normed, start, end)
                self.selected[index, start] = updated
            of_prompt = sum(position < self.prompt_len for position in updated)
            self.updates += of_prompt
            self.skipped += len(range(start, min(end, self.prompt_len))) - of_prompt
            before = hidden.clone()
            if index in self.reference.rule.stand_ins and index in self.reference.rule.layers:
                first, second, offset, *_ = self.reference.rule.stand_ins[index]
                hidden = hidden + normed @ first @ second + offset
            if updated:
                rows = torch.tensor(updated, device=hidden.device) - start
                hidden[rows] = self.reference.update(
                    layer, before[rows], normed[rows], positions[rows], keys, values
                )
        self.computed = end
        self.streams.append(hidden)
        return self.reference.logits(hidden).log_softmax(dim=-1)

    def fork(self, prompt: Sequence[int], cached: int) -> "Request":
        """A prefix-cache hit: a new request that takes this one's K and V for `cached` positions.

        It inherits the margin too: what it takes over depends on the choices made here.
        """
        if not 0 <= cached <= min(self.computed, len(prompt)):
            raise ValueError(f"{cached} cached of {self.computed} computed, prompt {len(prompt)}")
        if list(prompt[:cached]) != self.tokens[:cached] or prompt[0] != self.tokens[0]:
            raise ValueError("the prompt does not begin with the tokens that are cached")
        other = Request(self.reference, prompt)
        other.margin = self.margin
        other._cache, other.computed = self._cache, self.computed
        other.restart(cached)
        return other

    def restart(self, cached: int = 0) -> None:
        """Preemption: K and V past the first `cached` positions are lost, the tokens stay."""
        if not 0 <= cached <= self.computed:
            raise ValueError(f"{cached} cached of {self.computed} computed")
        self._cache = [(keys[:, :cached], values[:, :cached]) for keys, values in self._cache]
        self.computed = cached

    def _select(
        self, index: int, hidden: torch.Tensor, normed: torch.Tensor, start: int, end: int
    ) -> list[int]:
        """The positions of [start, end) that selective layer `index` updates, ascending."""
        rule = self.reference.rule
        keep = rule.layers[index]
        selected: list[int] = []
        parts: dict[int, list[int]] = {}  # window -> those of this forward that compete in it
        for position in range(start, end):
            if position == 0 or position >= self.prompt_len - rule.tail:
                selected.append(position)
            else:
                parts.setdefault(position // (rule.window or self.prompt_len), []).append(position)
        if not parts or keep == 0:
            return selected

        if len(rule.stand_ins.get(index, ())) == 4:
            scores = (-normed @ rule.stand_ins[index][3]).tolist()
        else:
            scores = self._cosines(index, hidden, start)
        for part in parts.values():
            count = math.ceil(keep * len(part) - 1e-9)
            ranked = sorted((scores[position - start], position) for position in part)
            selected.extend(position for _, position in ranked[:count])
            if 0 < count < len(ranked):
                self.margin = min(self.margin, ranked[count][0] - ranked[count - 1][0])
        return sorted(selected)

    def _cosines(self, index: int, hidden: torch.Tensor, start: int) -> list[float]:
        if start > 0 and not self._sinks:
            self._sinks = self.reference.sink(self.tokens[0])
        sink = hidden[0] if start == 0 else self._sinks[index]
        cosines: list[float] = F.cosine_similarity(hidden, sink[None], dim=-1).abs().tolist()
        return cosines
