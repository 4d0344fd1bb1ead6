"""From a dense weight to codes, scales and zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from hqqlora.config import QuantSettings
from hqqlora.ops import Solver
from hqqlora.state_encoding import META_DTYPES
from hqqlora.weighted_fit import check_importance, fit_weighted


def quantize_weight(
    weight: Tensor,
    settings: QuantSettings,
    meta_dtype: torch.dtype,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes `weight` [out_features, in_features] and returns (W_q, scale, zero).

    With the `importance` [in_features] of its columns (see `hqqlora.input_importance`) scale
    and zero are fitted to them after the solver has ended. Down a column (axis 0, where
    group_size divides out_features) all weights of a group matter the same: nothing is done.

    Raises:
        ValueError: the group size does not divide the weight, or an element is not finite;
            names the element. importance has another shape, or is negative or not finite.
        TypeError: the weight has no data, or is not float32, float16 or bfloat16.
    """
    if weight.dtype not in META_DTYPES:
        raise TypeError(f"a {weight.dtype} weight cannot be quantized")
    if weight.is_meta:
        raise TypeError("a weight on the meta device has no data to quantize")
    if importance is not None:
        check_importance(importance, weight.size(1))
    group_size = settings.group_size_for(weight.size(0), weight.size(1))
    try:
        W_q, scale, zero = torch.ops.hqqlora.quantize(
            weight.contiguous(),
            settings.nbits,
            group_size,
            settings.axis,
            meta_dtype,
            int(Solver[settings.effective_solver.upper()]),
            round_zero=settings.round_zero,
        )
    except RuntimeError:
        _check_finite(weight)
        raise
    if importance is None or settings.axis != 1:
        return W_q, scale, zero
    return fit_weighted(weight, W_q, scale, zero, settings.nbits, group_size, importance)


def _check_finite(weight: Tensor) -> None:
    if all(torch.isfinite(end) for end in torch.aminmax(weight)):
        return
    row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
    raise ValueError(
        f"weight[{row}, {column}] is {weight[row, column].item()}; "
        f"a weight must be finite to be quantized"
    )
