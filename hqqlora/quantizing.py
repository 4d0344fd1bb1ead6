"""From a dense weight to codes, scales and zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from hqqlora.config import QuantSettings
from hqqlora.ops import Solver
from hqqlora.state_values import META_DTYPES


def quantize_weight(
    weight: Tensor,
    settings: QuantSettings,
    meta_dtype: torch.dtype,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes `weight` [out_features, in_features] and returns (W_q, scale, zero).

    With the `importance` [in_features] of its columns (see `hqqlora.input_importance`) the
    solver's sums are weighted by it. Down a column (axis 0, where group_size divides
    out_features) all weights of a group matter the same: it makes no difference.

    Raises:
        ValueError: the group size does not divide the weight, or an element is not finite;
            names the element. importance has another shape, is negative or not finite, or the
            solver is not the default.
        TypeError: the weight has no data, or it or importance is not float32, float16 or
            bfloat16.
    """
    if weight.dtype not in META_DTYPES:
        raise TypeError(f"a {weight.dtype} weight cannot be quantized")
    if weight.is_meta:
        raise TypeError("a weight on the meta device has no data to quantize")
    if importance is not None:
        importance = _checked_importance(importance, weight, settings)
    group_size = settings.group_size_for(weight.size(0), weight.size(1))
    try:
        parts: tuple[Tensor, Tensor, Tensor] = torch.ops.hqqlora.quantize(
            weight.contiguous(),
            settings.nbits,
            group_size,
            settings.axis,
            meta_dtype,
            int(Solver[settings.effective_solver.upper()]),
            round_zero=settings.round_zero,
            importance=importance,
        )
    except RuntimeError:
        _check_finite(weight)
        raise
    return parts


def _checked_importance(importance: Tensor, weight: Tensor, settings: QuantSettings) -> Tensor:
    """As the op takes it."""
    if not isinstance(importance, Tensor) or importance.dtype not in META_DTYPES:
        raise TypeError("importance must be a tensor of float32, float16 or bfloat16")
    if tuple(importance.shape) != (weight.size(1),):
        raise ValueError(f"importance {list(importance.shape)} is not [{weight.size(1)}]")
    if not ((importance >= 0) & importance.isfinite()).all():
        raise ValueError("importance must be finite and not negative")
    if settings.effective_solver != "default":
        raise ValueError(
            f"importance needs solver 'default', not {settings.effective_solver!r}"
        )
    return importance.to(weight.device, torch.float32)


def _check_finite(weight: Tensor) -> None:
    if all(torch.isfinite(end) for end in torch.aminmax(weight)):
        return
    row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
    raise ValueError(
        f"weight[{row}, {column}] is {weight[row, column].item()}; "
        f"a weight must be finite to be quantized"
    )
