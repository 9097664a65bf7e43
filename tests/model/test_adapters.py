"""What adapters add to rows, against a loop over the rows with vLLM's tensors."""

from types import SimpleNamespace
from typing import Any

import torch

from orthorank_vllm.model.adapters import RowAdapters, base_of, embedded, product

SLOTS, RANK, IN = 3, 4, 24
SIZES = (16, 8, 8)
# The last one, which an index of -1 would take, is another's.
SLOT_OF_ROW = [2, -1, 0, 0, 1, -1, 2]


def layer_of(sizes: tuple[int, ...]) -> Any:
    """A linear layer as vLLM wraps it: some that it has fused, with weights of each."""
    base = torch.nn.Linear(IN, sum(sizes)).requires_grad_(False)
    return SimpleNamespace(
        base_layer=lambda rows: (base(rows), None),
        lora_a_stacked=tuple(torch.randn(SLOTS, 1, RANK, IN) for _ in sizes),
        lora_b_stacked=tuple(torch.randn(SLOTS, 1, size, RANK) for size in sizes),
    )


def by_row(layer: Any, rows: torch.Tensor, slots: list[int]) -> torch.Tensor:
    output: torch.Tensor = layer.base_layer(rows)[0].clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            parts = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
            output[row] += torch.cat(
                [up[slot, 0] @ (down[slot, 0] @ rows[row]) for down, up in parts]
            )
    return output


def adapters() -> RowAdapters:
    return RowAdapters.of_slots(torch.tensor(SLOT_OF_ROW), SLOTS, RANK, torch.float32)


def test_each_row_gets_its_own_adapters_product_and_no_others() -> None:
    """Break seen: rows without an adapter given the last slot's."""
    torch.manual_seed(0)
    layer, rows = layer_of(SIZES), torch.randn(len(SLOT_OF_ROW), IN)
    expected = by_row(layer, rows, SLOT_OF_ROW)
    torch.testing.assert_close(product(layer, rows, adapters()), expected)
    chosen = torch.tensor([1, 2, 6])
    found = product(layer, rows[chosen], adapters().of(chosen))
    torch.testing.assert_close(found, expected[chosen])


def test_a_part_of_a_fused_layers_columns_gets_its_part() -> None:
    torch.manual_seed(1)
    rows = torch.randn(len(SLOT_OF_ROW), IN)
    # As vLLM holds it of most models, and of Phi-3: one adapter of all three.
    for layer in (layer_of(SIZES), layer_of((sum(SIZES),))):
        plain = layer.base_layer(rows)[0]
        expected = by_row(layer, rows, SLOT_OF_ROW)
        for start, end in ((0, SIZES[0]), (SIZES[0], sum(SIZES)), (4, 20)):
            part = plain[:, start:end].clone()
            adapters().add_to(part, layer, rows, start)
            torch.testing.assert_close(part, expected[:, start:end])


def test_an_embedding_with_adapters_is_that_of_each_tokens_own() -> None:
    torch.manual_seed(2)
    base = torch.nn.Embedding(10, IN).requires_grad_(False)
    layer = SimpleNamespace(
        base_layer=base,
        lora_a_stacked=torch.randn(SLOTS, 10, RANK),
        lora_b_stacked=torch.randn(SLOTS, 1, IN, RANK),
    )
    tokens = torch.tensor([3, 3, 9, 0, 3, 5, 7])
    expected = base(tokens)
    for row, (token, slot) in enumerate(zip(tokens.tolist(), SLOT_OF_ROW, strict=True)):
        if slot >= 0:
            expected[row] += layer.lora_b_stacked[slot, 0] @ layer.lora_a_stacked[slot, token]
    torch.testing.assert_close(embedded(layer, tokens, adapters()), expected)


def test_without_adapters_a_wrapped_layer_is_its_base() -> None:
    layer, rows = layer_of(SIZES), torch.randn(5, IN)
    torch.testing.assert_close(product(layer, rows, None), layer.base_layer(rows)[0])
    assert base_of(layer) is layer.base_layer
    plain = torch.nn.Linear(2, 2)
    assert base_of(plain) is plain
