"""The map itself, and the file that it is kept in."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save

from orthorank_vllm.model.stand_in import (
    PARTS,
    FusedStandIn,
    StandIn,
    read_metadata,
    read_stand_ins,
    stand_ins_to_add,
    write_stand_ins,
)
from orthorank_vllm.options import OptionError
from tests.support.hostile import check_one_line, damaged

HIDDEN, RANK = 12, 3


@pytest.fixture
def stand_in() -> StandIn:
    numbers = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=numbers) for shape in ((HIDDEN, RANK), (RANK, HIDDEN)))
    offset, direction = torch.randn((2, HIDDEN), generator=numbers)
    return StandIn(down, up, offset, direction)


def fused(stand_in: StandIn) -> FusedStandIn:
    return stand_in.fused(torch.device("cpu"), torch.float32)


def test_two_products_add_the_map_and_its_offset_in_place(stand_in: StandIn) -> None:
    residual, normed = torch.randn(5, HIDDEN), torch.randn(5, HIDDEN)
    expected = residual + normed @ stand_in.down @ stand_in.up + stand_in.offset
    place = residual.data_ptr()
    fused(stand_in).add_to(residual, normed)
    torch.testing.assert_close(residual, expected)
    assert residual.data_ptr() == place
    assert fused(stand_in).rank == RANK + 1


def test_what_is_written_is_read_for_the_layers_that_have_it(
    tmp_path: Path, stand_in: StandIn
) -> None:
    path = tmp_path / "new" / "s.safetensors"
    write_stand_ins(path, {7: stand_in, 2: stand_in}, {"model": "a"})
    found = read_stand_ins(path, [2, 3])
    assert list(found) == [2]
    for part in PARTS:
        assert torch.equal(getattr(found[2], part), getattr(stand_in, part).half())
    assert read_metadata(path) == {"model": "a"}


def test_a_file_of_maps_whose_errors_are_not_known_is_read_too(
    tmp_path: Path, stand_in: StandIn
) -> None:
    path = tmp_path / "s.safetensors"
    write_stand_ins(path, {7: replace(stand_in, error_direction=None)}, {})
    [found] = read_stand_ins(path, [7]).values()
    assert found.error_direction is None
    assert not fused(found).knows_errors


def test_a_tokens_error_is_told_by_one_product_in_float32_whatever_the_models_dtype(
    stand_in: StandIn,
) -> None:
    """Break seen: in bfloat16 many tokens of a window are told the same."""
    normed = torch.randn(500, HIDDEN).bfloat16()
    errors = stand_in.fused(torch.device("cpu"), torch.bfloat16).errors(normed)
    assert stand_in.error_direction is not None
    torch.testing.assert_close(errors, normed.float() @ stand_in.error_direction)
    assert len(errors.unique()) > 490


def test_a_file_cut_short_is_refused(tmp_path: Path, stand_in: StandIn) -> None:
    path = tmp_path / "s.safetensors"
    write_stand_ins(path, {2: stand_in}, {})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SafetensorError):
        read_stand_ins(path, [2])


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_that_is_cut_or_hit_by_a_bit_flip_is_added_or_refused_in_one_line(
    stand_in: StandIn, tmp_path: Path, data: st.DataObject
) -> None:
    """Break seen: a shape that was another, in the first forward."""
    path = tmp_path / "broken.safetensors"
    write_stand_ins(path, {3: stand_in}, {})
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    try:
        found = stand_ins_to_add(path, [3, 4], HIDDEN, torch.float32)
    except OptionError as error:
        check_one_line(error)
        return
    for each in found.values():
        residual = torch.zeros(5, HIDDEN)
        each.add_to(residual, torch.ones(5, HIDDEN))
        assert residual.isfinite().all()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"up": None}, "3.up"),
        ({"up": torch.zeros(RANK + 1, HIDDEN)}, "3.up is torch.float32 of shape"),
        ({"down": torch.zeros(())}, "3.down is torch.float32 of shape"),
        ({"down": torch.zeros(HIDDEN + 1, RANK)}, f"of a model with {HIDDEN + 1} channels"),
        ({"offset": torch.zeros(HIDDEN, dtype=torch.int64)}, "3.offset is torch.int64 of shape"),
        ({"offset": torch.full((HIDDEN,), torch.nan)}, "3.offset holds what is no number"),
    ],
)
def test_a_map_that_cannot_be_added_is_refused_before_the_first_prompt(
    stand_in: StandIn, tmp_path: Path, change: dict[str, torch.Tensor | None], told: str
) -> None:
    parts = {**stand_in.parts, **change}
    tensors = {f"3.{name}": part for name, part in parts.items() if part is not None}
    path = tmp_path / "s.safetensors"
    path.write_bytes(save(tensors))
    with pytest.raises(OptionError, match="this worker cannot use it") as raised:
        stand_ins_to_add(path, [3], HIDDEN, torch.float32)
    assert told in str(raised.value)
    check_one_line(raised.value)
