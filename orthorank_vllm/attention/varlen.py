"""Whole texts side by side, attended to without a KV cache.

Calibration and evaluation compute each text in one forward from its first
token, so K and V need not outlive a layer. Texts are rows of one batch, as in
vLLM, and are padded to a rectangle for attention alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from orthorank_vllm.selection.plan import Batch, Ints, Plan


class PackedTexts:
    """Some texts as the rows of one forward.

    Attributes:
        tokens, positions: [T] int64.
        batch: the same as `plan.make_plan` takes it.
    """

    def __init__(self, texts: Sequence[Sequence[int]], device: torch.device) -> None:
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        self.tokens = torch.tensor([token for text in texts for token in text], device=device)
        self.batch = Batch(
            num_computed=np.zeros_like(lengths),
            query_len=lengths,
            prompt_len=lengths,
            first_token=np.array([text[0] for text in texts], dtype=np.int64),
        )
        self.first_rows = torch.from_numpy(np.cumsum(lengths) - lengths).to(device)
        self.positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        self._rectangle = _Rectangle(lengths, device)

    def attend(
        self, attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Causal attention of every token to its own text.

        Args:
            attn: vLLM's `Attention` layer.
            query, key, value: [T, heads x head size] and twice [T, kv heads x head size],
                the first two rotated.

        Returns:
            [T, heads x head size].
        """
        rectangle = self._rectangle
        output = scaled_dot_product_attention(
            rectangle.pad(query, attn.num_heads),
            _per_head(rectangle.pad(key, attn.num_kv_heads), attn),
            _per_head(rectangle.pad(value, attn.num_kv_heads), attn),
            is_causal=True,  # which also hides the padding: it comes last
            scale=attn.impl.scale,
        )
        return rectangle.unpad(output)

    def attend_from(
        self,
        attn: Any,
        rows: "SelectedRows",
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same for the queries of some rows.

        Args:
            query: [selected, heads x head size].
            visible: [T] bool, the keys that exist; None: all.

        Returns:
            [selected, heads x head size].
        """
        rectangle = self._rectangle
        positions = rows.rectangle.pad(self.positions[rows.indices, None], 1)[:, 0, :, 0]
        mask = torch.arange(rectangle.width, device=query.device) <= positions[:, :, None]
        if visible is not None:
            mask &= rectangle.pad(visible[:, None], 1)[:, 0, None, :, 0]
        output = scaled_dot_product_attention(
            rows.rectangle.pad(query, attn.num_heads),
            _per_head(rectangle.pad(key, attn.num_kv_heads), attn),
            _per_head(rectangle.pad(value, attn.num_kv_heads), attn),
            attn_mask=mask[:, None],
            scale=attn.impl.scale,
        )
        return rows.rectangle.unpad(output)


class SelectedRows:
    """The rows that one layer updates, grouped by text.

    Attributes:
        indices: [plan.num_selected] int64, ascending.
    """

    def __init__(self, plan: Plan, indices: torch.Tensor) -> None:
        self.indices = indices
        self.rectangle = _Rectangle(plan.selected_per_request, indices.device)


class _Rectangle:
    """Rows of consecutive groups as [groups, heads, longest group, head size], and back."""

    def __init__(self, lengths: Ints, device: torch.device) -> None:
        self.width = int(lengths.max())
        self._groups = len(lengths)
        self._is_full = bool((lengths == self.width).all())
        if not self._is_full:
            start = np.cumsum(lengths) - lengths
            column = np.minimum(np.arange(self.width), lengths[:, None] - 1)
            self._row_of_cell = torch.from_numpy((start[:, None] + column).ravel()).to(device)
            self._cell_of_row = torch.from_numpy(
                np.concatenate(
                    [group * self.width + np.arange(n) for group, n in enumerate(lengths)]
                )
            ).to(device)

    def pad(self, rows: torch.Tensor, heads: int) -> torch.Tensor:
        cells = rows if self._is_full else rows[self._row_of_cell]
        return cells.view(self._groups, self.width, heads, -1).transpose(1, 2)

    def unpad(self, cells: torch.Tensor) -> torch.Tensor:
        rows = cells.transpose(1, 2).reshape(self._groups * self.width, -1)
        return rows if self._is_full else rows[self._cell_of_row]


def _per_head(cells: torch.Tensor, attn: Any) -> torch.Tensor:
    group = attn.num_heads // attn.num_kv_heads
    return cells if group == 1 else cells.repeat_interleave(group, dim=1)
