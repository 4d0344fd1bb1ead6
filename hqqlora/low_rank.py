"""The correction of a quantization error: the B A of low rank that is nearest to it."""

from __future__ import annotations

import torch
from torch import Tensor

# Subspace iteration (Halko, Martinsson, Tropp, 2011, https://arxiv.org/abs/0909.4061) with
# these many directions more than asked for, and these many times through W and its transpose.
# What quantizing loses has nearly flat singular values, so that no iteration finds the very
# best directions, but it finds equally good ones: see docs/peft.md for what was measured.
_MORE_DIRECTIONS = 16
_ITERATIONS = 4


def nearest_of_rank(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """B [N, r] and A [r, K] with the B A that is nearest to `weight` [N, K], float32.

    The truncated singular value decomposition, exact where r is not small against the sides,
    otherwise by subspace iteration from a fixed start: the same for the same weight, and
    nothing is drawn from torch's generators. With r above the smaller side, that side's.
    """
    k = r + _MORE_DIRECTIONS
    if 2 * k >= min(weight.shape):
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        U, S, Vh = _leading(weight, k)
    root = S[:r].sqrt()
    return U[:, :r] * root, root[:, None] * Vh[:r]


def _leading(weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """About the first k singular values of `weight` and their vectors."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(weight.size(1), k, generator=generator).to(weight.device)
    rows = _orthonormal(weight @ start)
    for _ in range(_ITERATIONS):
        rows = _orthonormal(weight @ _orthonormal(weight.T @ rows))
    U, S, Vh = torch.linalg.svd(rows.T @ weight, full_matrices=False)
    return rows @ U, S, Vh


def _orthonormal(columns: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(columns).Q
    return Q


def column_weights(importance: Tensor | None, device: torch.device | str) -> Tensor | None:
    """What a column's error is multiplied by before the nearest is sought, so that it is
    nearest in what comes out: the root of `importance` [in_features], float32 on `device`, up
    to a factor (QERA, Zhang et al., 2024, https://arxiv.org/abs/2410.06040, its approximate
    form). As in the solver, no column counts for less than a hundredth of the mean: A is
    divided by it. None: all columns count the same."""
    if importance is None or not importance.any():
        return None
    squares = importance.to(device, torch.float32)
    squares = squares / squares.max()
    return squares.clamp_min(0.01 * squares.mean()).sqrt()


def correction(lost: Tensor, r: int, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """B [N, r] and A [r, K] of an adapter with the scaling 1 that begins with the best
    correction of `lost` [N, K], float32: the weight less the quantized one. `lost` is
    overwritten. `importance`: see `column_weights`."""
    columns = column_weights(importance, lost.device)
    if columns is None:
        return nearest_of_rank(lost, r)
    B, A = nearest_of_rank(lost.mul_(columns), r)
    return B, A / columns
