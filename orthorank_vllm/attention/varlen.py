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

from orthorank_vllm.selection.plan import Batch, Ints


class PackedTexts:
    """Some texts as the rows of one forward.

    Attributes:
        tokens, positions: [T] int64.
        batch: the texts as `plan.make_plan` takes them.
        first_rows: [texts] int64, where each begins.
    """

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        device: torch.device,
        prompt_lens: Sequence[int] | None = None,
    ) -> None:
        """Lay the texts out one after the other.

        Args:
            prompt_lens: tokens of each text that are its prompt; None: all.
        """
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        self.tokens = torch.tensor([token for text in texts for token in text], device=device)
        self.batch = Batch(
            num_computed=np.zeros_like(lengths),
            query_len=lengths,
            prompt_len=lengths if prompt_lens is None else np.array(prompt_lens, dtype=np.int64),
            first_token=np.array([text[0] for text in texts], dtype=np.int64),
        )
        self.first_rows = torch.from_numpy(np.cumsum(lengths) - lengths).to(device)
        self.positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        self.rectangle = Rectangle(lengths, device)


class VarlenAttention:
    """Causal attention of every text's queries to that text: an `AttentionPlan` without a cache."""

    def __init__(
        self, texts: PackedTexts, rows_per_text: Ints | None = None, hides_others: bool = False
    ) -> None:
        """Take the queries of every text, all of them or some.

        Args:
            rows_per_text: how many queries each text has; None: all.
            hides_others: whether rows without a query have no K and V, the first of a text apart.
        """
        self._texts = texts
        self._hides_others = hides_others
        self._queries = texts.rectangle
        if rows_per_text is not None:
            self._queries = Rectangle(rows_per_text, texts.tokens.device)

    def run(
        self,
        attn: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """[selected, heads x head size]: see `AttentionPlan.run`."""
        keys = self._texts.rectangle
        output = scaled_dot_product_attention(
            self._queries.pad(query, attn.num_heads),
            _per_head(keys.pad(key, attn.num_kv_heads), attn),
            _per_head(keys.pad(value, attn.num_kv_heads), attn),
            attn_mask=None if rows is None else self._mask(rows, positions),
            is_causal=rows is None,  # which also hides the padding: it comes last
            scale=attn.impl.scale,
        )
        return self._queries.unpad(output)

    def write(self, attn: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write nothing: K and V do not outlive the layer."""

    def _mask(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[texts, 1, longest part, longest text] bool, what each query sees."""
        keys = self._texts.rectangle
        of_cell = self._queries.pad(positions[:, None], 1)[:, 0, :, 0]
        mask = torch.arange(keys.width, device=rows.device) <= of_cell[:, :, None]
        if self._hides_others:
            is_there = torch.zeros_like(self._texts.tokens, dtype=torch.bool)
            is_there[rows] = True
            is_there[self._texts.first_rows] = True  # without the sink no attention works
            mask &= keys.pad(is_there[:, None], 1)[:, 0, None, :, 0]
        return mask[:, None]


class Rectangle:
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
        """[groups, heads, longest group, size] of [rows, heads x size]."""
        cells = rows if self._is_full else rows[self._row_of_cell]
        return cells.view(self._groups, self.width, heads, -1).transpose(1, 2)

    def unpad(self, cells: torch.Tensor) -> torch.Tensor:
        """[rows, heads x size] of what `pad` gives."""
        rows = cells.transpose(1, 2).reshape(self._groups * self.width, -1)
        return rows if self._is_full else rows[self._cell_of_row]


def _per_head(cells: torch.Tensor, attn: Any) -> torch.Tensor:
    group = attn.num_heads // attn.num_kv_heads
    return cells if group == 1 else cells.repeat_interleave(group, dim=1)
