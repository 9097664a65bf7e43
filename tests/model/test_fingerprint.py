"""Which weights a model has, told by samples of its checkpoint."""

from types import SimpleNamespace

import pytest
import torch

from orthorank_vllm.model.fingerprint import SAMPLES, Fingerprint, loads_weights

Weights = dict[str, torch.Tensor]


def weights() -> Weights:
    torch.manual_seed(3)
    return {
        "model.embed_tokens.weight": torch.randn(512, 64),
        **{
            f"model.layers.{layer}.{name}.weight": torch.randn(size)
            for layer in range(2)
            for name, size in {"self_attn.q_proj": (64, 64), "input_layernorm": (64,)}.items()
        },
    }


def value_of(*parts: Weights) -> str | None:
    fingerprint = Fingerprint()
    for part in parts:
        passed = dict(fingerprint.noting(iter(part.items())))
        assert all(passed[name] is part[name] for name in part)
    return fingerprint.value


def test_it_depends_neither_on_the_order_nor_on_the_parts_in_which_weights_come() -> None:
    given = weights()
    names = list(given)
    value = value_of(given)
    assert value is not None
    assert len(value) == 64
    assert value_of({name: given[name] for name in reversed(names)}) == value
    assert value_of(*({name: given[name]} for name in names)) == value


def test_a_fine_tune_of_one_projection_by_a_low_rank_is_told() -> None:
    """A merged LoRA leaves the embeddings and the norms as they were."""
    base, tuned = weights(), weights()
    name = "model.layers.1.self_attn.q_proj.weight"
    tuned[name] = tuned[name] + 0.01 * torch.randn(64, 1) @ torch.randn(1, 64)
    assert value_of(base) != value_of(tuned)


def test_a_change_of_one_row_or_one_column_is_told() -> None:
    """Break seen: samples a multiple of the row's length apart, all of the first column."""
    base = {"w": torch.zeros(1024, 512)}
    column, row = torch.zeros(1024, 512), torch.zeros(1024, 512)
    column[:, 100:110] = 1
    row[500:510] = 1
    assert len({value_of(base), value_of({"w": column}), value_of({"w": row})}) == 3


def test_names_shapes_and_types_count() -> None:
    values = {
        value_of({"a": torch.zeros(4, 2)}),
        value_of({"b": torch.zeros(4, 2)}),
        value_of({"a": torch.zeros(2, 4)}),
        value_of({"a": torch.zeros(4, 2, dtype=torch.int32)}),
    }
    assert len(values) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (SAMPLES, 7), (4, 3, 5)])
def test_any_type_and_shape_is_sampled(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert value_of({"w": torch.ones(shape).to(dtype)}) is not None


def test_weights_that_come_later_replace_their_like() -> None:
    before, after = {"w": torch.zeros(8)}, {"w": torch.ones(8)}
    assert value_of(before, after) == value_of(after)


def test_without_weights_or_with_some_that_cannot_be_sampled_there_is_none() -> None:
    assert value_of({}) is None
    strange: torch.Tensor = torch.zeros(4).as_subclass(type("Quantised", (torch.Tensor,), {}))
    assert value_of({"w": strange, "v": torch.zeros(4)}) is None


@pytest.mark.parametrize(
    ("load_format", "loads"), [("auto", True), ("dummy", False), ("dummy_dtensor", False)]
)
def test_formats_without_weights_are_known_by_their_name(load_format: str, loads: bool) -> None:
    assert loads_weights(SimpleNamespace(load_format=load_format)) == loads
