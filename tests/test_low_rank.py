"""The nearest matrix of low rank: as near as the exact one, always the same, in any shape."""

from __future__ import annotations

import pytest
import torch

from hqqlora.low_rank import correction, nearest_of_rank


@pytest.mark.parametrize("shape", [(200, 300), (300, 160), (40, 300)], ids=str)
@pytest.mark.parametrize("r", [1, 8, 32])
def test_it_is_as_near_as_the_exact_one(shape: tuple[int, int], r: int) -> None:
    """Of noise, whose singular values are the flattest; (40, 300) is decomposed exactly."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    B, A = nearest_of_rank(weight, r)
    assert B.shape == (shape[0], r)
    assert A.shape == (r, shape[1])
    exact = torch.linalg.svdvals(weight)[r:].norm()
    assert exact * 0.9999 <= (weight - B @ A).norm() <= exact * 1.01


def test_it_is_the_same_whatever_the_generators_state_and_leaves_that() -> None:
    weight = torch.randn(200, 300)
    first = nearest_of_rank(weight, 8)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = nearest_of_rank(weight, 8)
    assert all(map(torch.equal, first, again))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(200, 300), (30, 40)], ids=str)
def test_importance_decides_what_is_near(shape: tuple[int, int]) -> None:
    lost = torch.randn(shape)
    importance = torch.randn(shape[1]).mul(1.5).exp()
    importance[3] = 0
    columns = importance.clamp_min(0.01 * importance.mean()).sqrt()
    B, A = correction(lost.clone(), 8, importance)
    error = ((lost - B @ A) * columns).norm()
    plain, plain_A = correction(lost.clone(), 8, None)
    exact = torch.linalg.svdvals(lost * columns)[8:].norm()
    assert exact * 0.9999 <= error <= exact * 1.01
    assert error < 0.98 * ((lost - plain @ plain_A) * columns).norm()


def test_a_matrix_of_less_rank_and_one_of_zeros() -> None:
    low = torch.randn(200, 3) @ torch.randn(3, 300)
    B, A = nearest_of_rank(low, 8)
    assert (low - B @ A).norm() < 1e-4 * low.norm()
    B, A = nearest_of_rank(torch.zeros(200, 300), 8)
    assert not (B @ A).any()
    assert torch.isfinite(B).all()
    assert torch.isfinite(A).all()
