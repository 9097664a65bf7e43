"""What the end of a prompt attends to: a score that is known once the whole prompt is there."""

import torch

from orthorank_vllm.attention.varlen import PackedTexts
from orthorank_vllm.model.decoder import DecoderLayer

# Rows of the end; as many as SnapKV and its kin look from.
END = 16


def attention_of_end(layer: DecoderLayer, texts: PackedTexts, normed: torch.Tensor) -> torch.Tensor:
    """The attention that each token gets from the last ones of its prompt, [tokens] float32.

    The mean over heads, this rank's, and over the last `END` tokens; 0 for those of an answer.

    Args:
        normed: [tokens, hidden], the layer's norm of what enters it.
    """
    query, key = layer.queries_and_keys(texts.positions, normed)
    size, scale = layer.attn.head_dim, layer.attn.attn.impl.scale
    found = torch.zeros(len(normed), device=normed.device)
    starts, lengths = texts.first_rows.tolist(), texts.batch.prompt_len.tolist()
    for start, length in zip(starts, lengths, strict=True):
        end, positions = start + length, torch.arange(length, device=normed.device)
        last = slice(max(end - END, start), end)
        keys = key[start:end].view(length, -1, 1, size).float()
        queries = query[last].view(last.stop - last.start, keys.shape[1], -1, size).float()
        logits = torch.einsum("qhgd,khxd->hgqk", queries, keys) * scale
        logits.masked_fill_(positions > positions[last.start - start :, None], -torch.inf)
        found[start:end] = logits.softmax(-1).mean((0, 1, 2))
    return found
