"""Products of rows with the frozen weights of the experts they are routed to.

``x`` holds the rows sorted by expert: those of expert e are ``offsets[e]`` to
``offsets[e + 1] - 1``. The weights of all experts are stacked in one `PackedWeight`, whose
``W_q``, ``scale`` and ``zero`` have a first dimension E; A is [E, R, K] and B [E, N, R].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..ops import PackedWeight
from .dropout_seed import dropout_seed
from .functions import Gradients, factors_for, refuse_second_derivative
from .inputs import autocast_input, check_frozen

__all__ = ["grouped_linear", "grouped_lora_linear"]

LINEAR_INPUTS = 10
LORA_INPUTS = 15


def grouped_linear(x: Tensor, weight: PackedWeight, offsets: Tensor) -> Tensor:
    """``y [M, N]``, row m of it ``W_e x[m]`` for the expert e of that row.

    x: [M, K], float32, bfloat16 or float16, any strides, sorted by expert.
    weight: of E experts, stacked.
    offsets: int64 [E + 1] on the CPU: 0, where each next expert's rows begin, and M.

    Returns y in x's dtype. The gradient flows to x. Raises ValueError if scale or zero requires
    a gradient, and RuntimeError, with the values, where shapes, dtypes or offsets do not fit.
    """
    check_frozen(weight)
    x = autocast_input(x)
    arguments = (x, *weight[:3], offsets, *weight[3:])
    y: Tensor
    if torch.is_grad_enabled() and x.requires_grad:
        y = GroupedLinear.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        y = torch.ops.hqqlora.grouped_linear(*arguments)
    return y


def grouped_lora_linear(
    x: Tensor,
    weight: PackedWeight,
    offsets: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """``y [M, N]``, row m of it ``W_e x[m] + scaling * B_e A_e drop(x[m])``.

    x, weight, offsets: as in `grouped_linear`.
    A, B: [E, R, K] and [E, N, R], any of the three dtypes, as in `lora_linear`; R up to 256.
    dropout: as in `lora_linear`.

    Returns y in x's dtype; gradients flow to x, A and B, which get zeros for experts without
    rows. Raises as `grouped_linear` does.
    """
    check_frozen(weight)
    x = autocast_input(x)
    seed = dropout_seed(x.device) if dropout > 0 else None
    arguments = (x, *weight[:3], offsets, A, B, seed, scaling, dropout, *weight[3:])
    y: Tensor
    if torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad):
        y = GroupedLoRALinear.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        y, _ = _forward_lora(arguments)
    return y


def _forward_lora(inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    x, W_q, scale, zero, offsets, A, B, *rest = inputs
    A, B = factors_for(x.dtype, A, B)
    y, xa = torch.ops.hqqlora.grouped_lora_linear(x, W_q, scale, zero, offsets, A, B, *rest)
    return y, xa


class GroupedLinear(Function):
    """Inputs: x, W_q, scale, zero, offsets, then the format (out_features to axis)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _, W_q, scale, zero, offsets, *ctx.format = inputs
        ctx.save_for_backward(W_q, scale, zero, offsets)
        y: Tensor = torch.ops.hqqlora.grouped_linear(*inputs)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        dx = torch.ops.hqqlora.grouped_linear_dgrad(dy, *ctx.saved_tensors, *ctx.format)
        (dx,) = refuse_second_derivative((dx,), (dy,))
        return dx, *(None,) * (LINEAR_INPUTS - 1)


class GroupedLoRALinear(Function):
    """Inputs: x, W_q, scale, zero, offsets, A, B, seed, scaling, dropout, then the format.

    Keeps what `LoRALinear` keeps: x only where A needs a gradient, xa only where B does.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, W_q, scale, zero, offsets, A, B, seed, *ctx.numbers = inputs
        y, xa = _forward_lora(inputs)
        needs_dA, needs_dB = ctx.needs_input_grad[5:7]
        ctx.save_for_backward(
            x if needs_dA else None,
            xa if needs_dB else None,
            *(W_q, scale, zero, offsets, A, B, seed),
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        needs_dx, _, _, _, _, needs_dA, needs_dB, *_ = ctx.needs_input_grad
        *before, A, B, seed = ctx.saved_tensors
        factors = factors_for(dy.dtype, A, B)
        dx, dA, dB = torch.ops.hqqlora.grouped_lora_linear_backward(
            dy, *before, *factors, seed, *ctx.numbers, needs_dx, needs_dA, needs_dB
        )
        gradients: Gradients = (
            dx if needs_dx else None,
            dA.to(A.dtype) if needs_dA else None,
            dB.to(B.dtype) if needs_dB else None,
        )
        dx, dA, dB = refuse_second_derivative(gradients, (dy, *ctx.saved_tensors))
        return dx, None, None, None, None, dA, dB, *(None,) * (LORA_INPUTS - 7)
