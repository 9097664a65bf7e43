"""vLLM's decoders by their parts: what the families share, and the few places where they differ.

The sparse forward and the measurements know a model by these parts alone. A family made of them
is served by naming it in `architectures`; what else a layer may hold is refused here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.models.utils import PPMissingLayer

from orthorank_vllm.attention.backend import AttentionPlan
from orthorank_vllm.model.adapters import RowAdapters, embedded, product
from orthorank_vllm.model.ops import add_and_norm, mlp, norm_heads, rotate
from orthorank_vllm.model.qkv import SplitWeight, project
from orthorank_vllm.model.stand_in import FusedStandIn
from orthorank_vllm.options import OptionError

# Of the residual stream that enters a layer, and of it normalised, [tokens, hidden] each, to the
# rows that are computed: [selected] int64, ascending; None: all of them.
Pick = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]

# Parts with which a layer computes more than this module knows of, by where they are.
UNKNOWN_PARTS = {
    "do_llama_4_scaling": "queries scaled by their position",
    "dual_chunk_attention_config": "dual-chunk attention",
    "ada_rms_norm_t_cond": "a norm conditioned on time",
    "sinks": "learned attention sinks, with which position 0 does not see itself alone",
}


@dataclass(frozen=True)
class DecoderLayer:
    """One layer, its modules vLLM's own.

    Attributes:
        attn: with `qkv_proj`, `attn`, `o_proj`, and the sizes `q_size` and `kv_size`.
        feed_forward: the MLP or the mixture of experts.
        rotary: None in a layer without position embedding.
        query_norm, key_norm: of each head, where there are such (Qwen3).
        residual_scale: of what a layer adds to the residual stream (Granite).
    """

    input_norm: Any
    attn: Any
    post_norm: Any
    feed_forward: Any
    rotary: Any
    query_norm: Any
    key_norm: Any
    residual_scale: float

    @classmethod
    def of(cls, layer: Any) -> "DecoderLayer":
        """The parts of one of vLLM's layers.

        Raises:
            OptionError: it is not made of these parts.
        """
        attn = layer.self_attn
        for owner in (layer, attn):
            for name, what in UNKNOWN_PARTS.items():
                if getattr(owner, name, None) not in (None, False):
                    raise OptionError(
                        f"--orthorank-ratio: not possible with this model, its layers have {what}"
                    )
        return cls(
            input_norm=layer.input_layernorm,
            attn=attn,
            post_norm=layer.post_attention_layernorm,
            feed_forward=layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe,
            rotary=attn.rotary_emb if getattr(attn, "use_rope", True) else None,
            query_norm=getattr(attn, "q_norm", None),
            key_norm=getattr(attn, "k_norm", None),
            residual_scale=float(getattr(layer, "residual_multiplier", 1.0)),
        )

    def forward(
        self,
        attention: AttentionPlan,
        positions: torch.Tensor,
        residual: torch.Tensor,
        update: torch.Tensor | None,
        pick: Pick | None = None,
        split: SplitWeight | None = None,
        stand_in: FusedStandIn | None = None,
        adapters: RowAdapters | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute K and V of every row, and everything else for the rows that `pick` names.

        What the layer's own forward does (llama.py), by the fast kernels; served prompts, whole
        texts and the sink's states all go this way.

        Args:
            attention: for as many rows of each request as `pick` names.
            positions: [tokens].
            residual, update: [tokens, hidden], whose sum is the residual stream that enters the
                layer; vLLM's layers hand it on in two summands. Both are used up.
            pick: None: all rows.
            split: the QKV weight cut in two, where some rows are picked and that can be done.
            stand_in: what the rows that are not picked get in place of an update.
            adapters: of all rows; None: no row has one.

        Returns:
            residual, update: the same after the layer; update is None where rows were picked.
        """
        normed, residual = add_and_norm(self.input_norm, residual, update)
        rows = None if pick is None else pick(residual, normed)
        key, value, query_of = project(self.attn, split, normed, adapters)
        if rows is None:
            query, key = self._normed_and_placed(positions, query_of(None, adapters), key)
            entering = residual
        else:
            adapters = None if adapters is None else adapters.of(rows)
            key = self._placed(positions, self._normed(self.key_norm, key), None)[0]
            entering = residual.index_select(0, rows)
            query = query_of(rows, adapters)
            if stand_in is not None:
                stand_in.add_to(residual, normed)
            if not len(rows):
                attention.write(self.attn.attn, key, value)
                return residual, None
            positions = positions.index_select(0, rows)
            query = self._placed(positions, self._normed(self.query_norm, query), None)[0]
        attended = attention.run(self.attn.attn, query, key, value, rows, positions)
        output = product(self.attn.o_proj, attended, adapters)
        normed, updated = add_and_norm(self.post_norm, entering, self._scaled(output))
        update = self._scaled(mlp(self.feed_forward, normed, adapters))
        if rows is None:
            return updated, update
        return residual.index_copy_(0, rows, updated.add_(update)), None

    def replace(
        self, residual: torch.Tensor, update: torch.Tensor | None, stand_in: FusedStandIn
    ) -> torch.Tensor:
        """The residual stream after a stand-in of the whole layer, for every row; see `forward`."""
        normed, residual = add_and_norm(self.input_norm, residual, update)
        stand_in.add_to(residual, normed)
        return residual

    def queries_and_keys(
        self, positions: torch.Tensor, normed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention takes of every row, [tokens, heads x head size] each; see `forward`."""
        key, _, query_of = project(self.attn, None, normed)
        return self._normed_and_placed(positions, query_of(None, None), key)

    def _normed_and_placed(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, key = self._normed(self.query_norm, query), self._normed(self.key_norm, key)
        return self._placed(positions, query, key)

    def _normed(self, norm: Any, heads: torch.Tensor) -> torch.Tensor:
        return heads if norm is None else norm_heads(norm, heads, self.attn.head_dim)

    def _placed(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        return (query, key) if self.rotary is None else rotate(self.rotary, positions, query, key)

    def _scaled(self, update: torch.Tensor) -> torch.Tensor:
        return update if self.residual_scale == 1 else update.mul_(self.residual_scale)


class Decoder:
    """The model between token ids and final states, or the part of it that a pipeline stage holds.

    Attributes:
        layers: this stage's, by their index in the model.
        is_first, is_last: whether it embeds the tokens, and whether it normalises what comes out.
        last_layer: index of the model's last layer, wherever it is.
        norm: the last one; a placeholder where another stage has it.
    """

    def __init__(self, model: Any) -> None:
        """Take apart the layers of this stage.

        Args:
            model: vLLM's `LlamaModel` or one with the same parts
                (vllm/model_executor/models/llama.py).

        Raises:
            OptionError: see `DecoderLayer.of`.
        """
        self.layers = {
            index: DecoderLayer.of(layer)
            for index, layer in enumerate(model.layers)
            if not isinstance(layer, PPMissingLayer)
        }
        self.last_layer = len(model.layers) - 1
        self.is_first = 0 in self.layers
        self.is_last = self.last_layer in self.layers
        self.norm = model.norm
        self._model = model
        self._embedding_scale = float(getattr(model.config, "embedding_multiplier", 1.0))

    @property
    def told_layers(self) -> tuple[int, ...]:
        """Before which layers the residual stream is told beside the output (EAGLE-3).

        The number of layers is the end. vLLM says so once the model is loaded.
        """
        return tuple(getattr(self._model, "aux_hidden_state_layers", ()))

    def embed(self, tokens: torch.Tensor, adapters: RowAdapters | None = None) -> torch.Tensor:
        """[T] token ids to the [T, hidden] residual stream that enters the first layer."""
        return self.entering(embedded(self._model.embed_tokens, tokens, adapters))

    def entering(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[T, hidden] embeddings to what `embed` gives; themselves where nothing scales them."""
        return embeddings if self._embedding_scale == 1 else embeddings * self._embedding_scale
