"""Weighted least squares for scale and zero, where some columns of a weight matter more.

After the default solver, for each group of axis 1, as that does on its own with m = 1:

    t = w / scale + zero,     q = nearest code,     t ~ q + a (q - levels/2) + b

with the sum of m (t - q - ...)^2 the least; then scale and zero are rounded to their storage
type. A group keeps what it had where that has the smaller sum of m (w - w')^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqqlora.packed_codes import empty_words, write_codes
from hqqlora.state_encoding import META_DTYPES

_ROUNDS = {8: 4, 4: 4, 2: 4, 3: 8, 1: 8}
# Weights at a time: about ten float32 tensors of so many elements are in use, 40 MB.
_AT_ONCE = 2**20


def check_importance(importance: Tensor, in_features: int) -> None:
    """Raises ValueError unless it is [in_features], finite and not negative, and TypeError
    unless it is a floating-point tensor."""
    if not isinstance(importance, Tensor) or importance.dtype not in META_DTYPES:
        raise TypeError("importance must be a tensor of float32, float16 or bfloat16")
    if tuple(importance.shape) != (in_features,):
        raise ValueError(f"importance {list(importance.shape)} is not [{in_features}]")
    if not ((importance >= 0) & importance.isfinite()).all():
        raise ValueError("importance must be finite and not negative")


def fit_weighted(
    weight: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    nbits: int,
    group_size: int,
    importance: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(W_q, scale, zero) of axis 1 for `weight` [N, K], from those of another solver, given the
    columns' importance [K] (see `check_importance`)."""
    K = weight.size(1)
    m = importance.to(weight.device, torch.float32)
    if not m.any():
        return W_q, scale, zero
    # A hundredth of the mean keeps a line defined for a group whose columns are never used.
    m = m / m.max()
    m = m + 0.01 * m.mean()
    levels = 2**nbits - 1
    packed = empty_words(tuple(W_q.shape), nbits, W_q.device)  # type: ignore[arg-type]
    scale, zero = scale.clone(), zero.clone()
    flat = weight.reshape(-1)
    step = max(1, _AT_ONCE // group_size)
    for first in range(0, len(scale), step):
        groups = slice(first, min(first + step, len(scale)))
        start, stop = groups.start * group_size, groups.stop * group_size
        columns = torch.arange(start, stop, device=weight.device) % K
        w = flat[start:stop].float().view(-1, group_size)
        codes, scale[groups], zero[groups] = _fit_groups(
            w, m[columns].view_as(w), scale[groups], zero[groups], levels, _ROUNDS[nbits]
        )
        write_codes(packed, nbits, start, codes.view(-1))
    return packed, scale, zero


def _fit_groups(
    w: Tensor, m: Tensor, scale: Tensor, zero: Tensor, levels: int, rounds: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [groups, G], scale and zero [groups, 1] for weights and their importance
    [groups, G], from the scale and zero of another solver."""
    s, z = scale.float(), zero.float()
    total = m.sum(1, keepdim=True)
    for _ in range(rounds):
        q, t = _nearest_codes(w, s, z, levels)
        v, r = q - levels / 2, t - q
        mv = m * v
        sum_v, sum_r = mv.sum(1, keepdim=True), (m * r).sum(1, keepdim=True)
        variance = (mv * v).sum(1, keepdim=True) * total - sum_v * sum_v
        a = ((mv * r).sum(1, keepdim=True) * total - sum_v * sum_r) / variance
        b = (sum_r - a * sum_v) / total
        good = (variance > 1e-6 * total * total) & (a > -0.999)
        z = torch.where(good, (z - b + a * (levels / 2)) / (1 + a), z)
        s = torch.where(good, s * (1 + a), s)
    new_scale, new_zero = s.to(scale.dtype), z.to(zero.dtype)
    s, z, old = new_scale.float(), new_zero.float(), scale.float()
    # In units of the old scale: the squares of very large or small weights leave float32.
    better = _error(w, m, s, z, levels, s / old) < _error(w, m, old, zero.float(), levels, 1)
    better &= (s > 0) & s.isfinite() & z.isfinite()
    new_scale = torch.where(better, new_scale, scale)
    new_zero = torch.where(better, new_zero, zero)
    q, _ = _nearest_codes(w, new_scale.float(), new_zero.float(), levels)
    return q.to(torch.uint8), new_scale, new_zero


def _nearest_codes(w: Tensor, s: Tensor, z: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The codes, and the positions that they are nearest to."""
    t = w / s + z
    return t.clamp(0, levels).round_(), t


def _error(
    w: Tensor, m: Tensor, s: Tensor, z: Tensor, levels: int, units: Tensor | int
) -> Tensor:
    q, t = _nearest_codes(w, s, z, levels)
    return (m * (t - q).square_()).sum(1, keepdim=True) * units**2
