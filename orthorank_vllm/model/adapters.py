"""LoRA adapters: each row's own, in whichever rows a layer computes.

vLLM's layers with adapters (vllm/lora/layers) give a step's rows theirs by their order in the step,
all of them. A selective layer computes other rows, and so do the sink's states. So whose adapter a
row has goes along with the rows, and vLLM's layers are asked for their weights alone: those of all
slots side by side, of which a row's own columns are kept. A model without rows that have any is
the base model, whatever vLLM has wrapped of it.
"""

from typing import Any

import torch
from torch.nn.functional import embedding, linear
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import RowParallelLinear

# Without an adapter; as vLLM has it.
NO_SLOT = -1


class RowAdapters:
    """The adapters of some rows.

    Attributes:
        slots: [rows] int64, where vLLM keeps a row's adapter; `NO_SLOT`: it has none.
        columns: [rows, slots x rank] of 0 and 1, the columns of a row's own adapter.
    """

    def __init__(self, slots: torch.Tensor, columns: torch.Tensor) -> None:
        self.slots = slots
        self.columns = columns

    @classmethod
    def of_slots(
        cls, slots: torch.Tensor, num_slots: int, rank: int, dtype: torch.dtype
    ) -> "RowAdapters":
        """Those of rows in these slots.

        Args:
            slots: [rows] int64.
            num_slots: that vLLM has.
            rank: the largest that an adapter can have, which all have in vLLM's tensors.
            dtype: the adapters'.
        """
        every = torch.arange(num_slots, device=slots.device).repeat_interleave(rank)
        return cls(slots, (slots[:, None] == every).to(dtype))

    def of(self, rows: torch.Tensor | None) -> "RowAdapters":
        """Those of some of the rows, [selected] int64; None: all."""
        if rows is None:
            return self
        return RowAdapters(self.slots.index_select(0, rows), self.columns.index_select(0, rows))

    def add_to(self, output: torch.Tensor, module: Any, rows: torch.Tensor, start: int = 0) -> None:
        """Add what the rows' adapters make of them, in place.

        Args:
            output: [rows, columns], what the base layer makes of them, before it is added up over
                tensor-parallel ranks.
            module: vLLM's linear layer; nothing is added by one that it has not wrapped.
            rows: [rows, in].
            start: the output's first column among all of the layer's.
        """
        if not has_adapters(module):
            return
        begins, end = 0, start + output.shape[1]
        # Of layers that vLLM has fused, each has adapters of its own.
        for down, up in zip(module.lora_a_stacked, module.lora_b_stacked, strict=True):
            ends = begins + up.shape[2]
            first, last = max(begins, start), min(ends, end)
            if first < last:
                narrow = linear(rows, down.flatten(0, 2).to(rows.dtype)).mul_(self.columns)
                part = up[:, :, first - begins : last - begins]
                output[:, first - start : last - start].addmm_(narrow, _side_by_side(part, output))
            begins = ends

    def add_to_embedded(self, output: torch.Tensor, module: Any, tokens: torch.Tensor) -> None:
        """Add what the tokens' adapters make of them, in place.

        Args:
            output: [tokens, hidden], their embeddings.
            module: vLLM's embedding; nothing is added by one that it has not wrapped.
        """
        if not has_adapters(module):
            return
        num_slots, vocabulary, _ = module.lora_a_stacked.shape
        # Of rows without one any will do: no column of it is kept.
        places = tokens + self.slots.clamp(min=0) * vocabulary
        narrow = embedding(places, module.lora_a_stacked.flatten(0, 1)).to(output.dtype)
        narrow = narrow.repeat(1, num_slots).mul_(self.columns)
        output.addmm_(narrow, _side_by_side(module.lora_b_stacked, output))


def has_adapters(module: Any) -> bool:
    """Whether vLLM has wrapped a layer, so that there may be adapters of it."""
    return hasattr(module, "base_layer")


def base_of(module: Any) -> Any:
    """The layer itself, where vLLM has wrapped it."""
    return getattr(module, "base_layer", module)


def product(module: Any, rows: torch.Tensor, adapters: RowAdapters | None) -> torch.Tensor:
    """What one of vLLM's linear layers makes of rows, each with its adapter.

    Args:
        rows: [rows, in].
        adapters: of these rows; None: none has one.
    """
    base = base_of(module)
    output: torch.Tensor
    if adapters is None or not has_adapters(module):
        output = base(rows)[0]
    elif isinstance(base, RowParallelLinear) and base.tp_size > 1:
        # As its own forward does, with what adapters add to this rank's part.
        output = base.quant_method.apply(base, rows, None if base.tp_rank else base.bias)
        adapters.add_to(output, module, rows)
        output = tensor_model_parallel_all_reduce(output)
    else:
        output = base(rows)[0]
        adapters.add_to(output, module, rows)
    return output


def embedded(module: Any, tokens: torch.Tensor, adapters: RowAdapters | None) -> torch.Tensor:
    """[tokens, hidden] of [tokens] token ids, see `product`."""
    output: torch.Tensor = base_of(module)(tokens)
    if adapters is not None:
        adapters.add_to_embedded(output, module, tokens)
    return output


def base_logits(causal_lm: Any, states: torch.Tensor) -> torch.Tensor | None:
    """The base model's logits, of any rows; None in a worker that does not see them.

    Args:
        causal_lm: vLLM's model.
        states: [rows, hidden], final and normalised.
    """
    logits: torch.Tensor | None
    processor = causal_lm.logits_processor
    if has_adapters(processor):
        logits = processor.base_layer(base_of(causal_lm.lm_head), states)
    else:
        logits = causal_lm.compute_logits(states)
    return logits


def _side_by_side(up: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """[slots x rank, columns] of [slots, 1, columns, rank], in the output's dtype."""
    return up.squeeze(1).transpose(1, 2).flatten(0, 1).to(output.dtype)
