"""From a dense weight to codes, scales and zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from hqqlora.config import QuantSettings
from hqqlora.ops import Solver
from hqqlora.state_encoding import META_DTYPES


def quantize_weight(
    weight: Tensor, settings: QuantSettings, meta_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes `weight` [out_features, in_features] and returns (W_q, scale, zero).

    Raises:
        ValueError: the group size does not divide the weight, or an element is not finite;
            names the element.
        TypeError: the weight has no data, or is not float32, float16 or bfloat16.
    """
    if weight.dtype not in META_DTYPES:
        raise TypeError(f"a {weight.dtype} weight cannot be quantized")
    if weight.is_meta:
        raise TypeError("a weight on the meta device has no data to quantize")
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
    return W_q, scale, zero


def _check_finite(weight: Tensor) -> None:
    if all(torch.isfinite(end) for end in torch.aminmax(weight)):
        return
    row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
    raise ValueError(
        f"weight[{row}, {column}] is {weight[row, column].item()}; "
        f"a weight must be finite to be quantized"
    )
