"""The regression, on numbers whose answer is known."""

import pytest
import torch

from orthorank_vllm.model.stand_in import StandIn
from orthorank_vllm.offline.stand_in_fit import Moments, fit, with_error_direction

HIDDEN, RANK = 16, 4


def drawn(count: int, seed: int, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """States away from 0, and a map of low rank of them, with an offset."""
    fixed = torch.Generator().manual_seed(0)
    weight = torch.randn(HIDDEN, RANK, generator=fixed) @ torch.randn(RANK, HIDDEN, generator=fixed)
    offset = 5 * torch.randn(HIDDEN, generator=fixed)
    numbers = torch.Generator().manual_seed(seed)
    states = torch.randn(count, HIDDEN, generator=numbers) + 2
    more = noise * torch.randn(count, HIDDEN, generator=numbers)
    return states, states @ weight + offset + more


def applied(stand_in: StandIn, states: torch.Tensor) -> torch.Tensor:
    return states.double() @ stand_in.down @ stand_in.up + stand_in.offset


def test_a_map_of_low_rank_is_found_with_its_offset() -> None:
    """Break seen: the offset left at the mean of what is added."""
    found = fit(Moments.of(*drawn(2000, 1)), Moments.of(*drawn(500, 2)), rank=RANK)
    states, added = drawn(100, 3)
    assert found.rank == RANK
    assert (applied(found, states) - added).abs().max() < 0.02 * added.abs().max()


def test_of_a_map_of_higher_rank_the_largest_directions_are_kept() -> None:
    states, added = drawn(2000, 1)
    moments, held_back = Moments.of(states, added), Moments.of(*drawn(500, 2))
    errors = [
        (applied(fit(moments, held_back, rank), states) - added).square().mean().item()
        for rank in (1, 2, 3, 4)
    ]
    assert errors == sorted(errors, reverse=True)
    # As good as the best of that rank: what singular values of what is added leave.
    spectrum = torch.linalg.svdvals(added.double() - added.double().mean(0)).square()
    assert errors[1] == pytest.approx(spectrum[2:].sum().item() / added.numel(), rel=0.05)


def test_sums_of_parts_are_those_of_the_whole() -> None:
    states, added = drawn(300, 1, noise=1.0)
    whole = Moments.of(states, added)
    parts = Moments.of(states[:100], added[:100]) + Moments.of(states[100:], added[100:])
    for name, value in vars(whole).items():
        of_parts = torch.as_tensor(getattr(parts, name))
        torch.testing.assert_close(of_parts, torch.as_tensor(value), rtol=1e-5, atol=1e-2)


def test_the_error_is_that_of_the_tokens_themselves() -> None:
    states, added = drawn(300, 1, noise=1.0)
    weight, offset = torch.randn(HIDDEN, HIDDEN).double(), torch.randn(HIDDEN).double()
    direct = (states.double() @ weight + offset - added).square().sum(1).mean().item()
    assert Moments.of(states, added).error(weight, offset) == pytest.approx(direct, rel=1e-4)


def test_few_noisy_texts_are_fitted_with_a_stronger_ridge() -> None:
    """Guards against: the ridge that is best on what was fitted on, always the weakest."""
    few, check = drawn(20, 1, noise=3.0), Moments.of(*drawn(500, 2))
    by_check = fit(Moments.of(*few), check, rank=HIDDEN)
    by_itself = fit(Moments.of(*few), Moments.of(*few), rank=HIDDEN)

    def error(stand_in: StandIn) -> float:
        return check.error(stand_in.down @ stand_in.up, stand_in.offset)

    assert error(by_check) < 0.8 * error(by_itself)


def test_the_direction_along_which_a_tokens_error_grows_is_found() -> None:
    """Breaks seen: not centred; the map added to what it is to be taken from."""
    numbers = torch.Generator().manual_seed(5)
    true = torch.randn(HIDDEN, generator=numbers) * 0.5
    states, added = drawn(4000, 1)
    noise = torch.randn(states.shape, generator=numbers)
    added = added + 3 * noise * (states @ true / 2).exp()[:, None]
    moments = Moments.of(states, added)
    stand_in = fit(moments, moments, rank=RANK)
    halves = zip(states.split(2000), added.split(2000), strict=True)
    found = with_error_direction(stand_in, moments, halves).error_direction
    assert found is not None
    assert torch.cosine_similarity(found.float(), true, dim=0) > 0.98
    assert float(found.norm()) == pytest.approx(float(true.norm()), rel=0.2)
