"""Products of one x with several frozen weights, whose adapters share the passes over x.

With ``A`` the A of all of them, one under another, and ``dxa = scaling * (dy B)`` of all of
them side by side::

    xa = x A^T        dA = dxa^T x        dx = dy_1 W_1 + dxa A    + dy_2 W_2 + ...

the first two are one product each, and so is ``dxa A``. The layer that is called first computes
them, in forward and in backward (`FirstOfShared`): backward gets to it last, since the others'
``xa`` come from it. The others (`OtherOfShared`) never see A, and keep no x.

Against separate layers, n layers with one x thus read x once instead of n times for xa, and
once instead of n times for dA, and they write the adapters' part of dx once instead of n times
(where it is written at all, for a GEMM on blocks of W to add to). With rows of K elements that
is ``2 (n - 1) K`` elements less read, and ``(n - 1) K`` less written and read again, a token;
the copies of A and of xa that it takes are ``R K`` in all and ``R`` a token.

No dropout: each layer has a mask of its own, and then there is nothing to share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..ops import PackedWeight
from .functions import bias_gradient, refuse_second_derivative
from .inputs import autocast_input, bias_for, check_frozen

__all__ = ["Part", "first_of_shared", "other_of_shared"]

# Inputs before the A of all layers, and inputs of the other layers.
FIRST_INPUTS = 12
OTHER_INPUTS = 13


class Part(NamedTuple):
    """A layer: ``y = x W^T + bias + scaling * (x A^T) B^T``. A and B as in `lora_linear`."""

    weight: PackedWeight
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scaling: float


def first_of_shared(
    x: Tensor, part: Part, other_As: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y [..., N] of the layer `part`, and xa [M, R] of the layers that `other_As` belong to,
    for `other_of_shared`.

    x: [..., K], as in `lora_linear`. other_As: [R, K] each; all ranks add up to 256 at most.
    Gradients flow to x, bias, B, and to all A. Raises as `lora_linear` does.
    """
    check_frozen(part.weight)
    x = autocast_input(x)
    W_q, scale, zero, *numbers = part.weight
    inputs = (x, W_q, scale, zero, bias_for(x, part.bias), part.B, part.scaling, *numbers)
    As = (part.A, *other_As)
    if torch.is_grad_enabled():
        y, *xas = FirstOfShared.apply(*inputs, *As)  # type: ignore[no-untyped-call]
    else:
        y, _, xas = _forward_first((*inputs, *As))
    return y, tuple(xas)


def other_of_shared(x: Tensor, part: Part, xa: Tensor) -> Tensor:
    """y [..., N] of a layer whose xa `first_of_shared` has computed from the same x."""
    check_frozen(part.weight)
    x = autocast_input(x)
    W_q, scale, zero, *numbers = part.weight
    inputs = (x, xa, W_q, scale, zero, bias_for(x, part.bias), part.B, part.scaling, *numbers)
    if not torch.is_grad_enabled():
        return _forward_other(inputs)
    y: Tensor = OtherOfShared.apply(*inputs)  # type: ignore[no-untyped-call]
    return y


def _factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A or B as the ops take it for an x of dtype."""
    return factor if factor.dtype in (dtype, torch.float32) else factor.float()


def _stacked(As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """R K numbers, copied for the time of a product: one storage for all would be undone by
    whatever replaces parameters (FSDP, ``.to``, loading)."""
    return torch.cat([_factor(A, dtype) for A in As])


def _forward_first(inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, and xa of its own and of the others."""
    x, W_q, scale, zero, bias, B, *numbers = inputs[:FIRST_INPUTS]
    As = inputs[FIRST_INPUTS:]
    xas = torch.ops.hqqlora.lora_project(x, _stacked(As, x.dtype))
    xa, *others = (part.contiguous() for part in xas.split([A.shape[0] for A in As], 1))
    y: Tensor = torch.ops.hqqlora.lora_linear_from_xa(
        x, W_q, scale, zero, bias, xa, _factor(B, x.dtype), *numbers
    )
    return y, xa, others


def _forward_other(inputs: tuple[Any, ...]) -> Tensor:
    x, xa, W_q, scale, zero, bias, B, *numbers = inputs
    y: Tensor = torch.ops.hqqlora.lora_linear_from_xa(
        x, W_q, scale, zero, bias, xa, _factor(B, x.dtype), *numbers
    )
    return y


def _factor_gradients(
    dy: Tensor, xa: Tensor | None, B: Tensor, scaling: float, needs_dxa: bool, needs_dB: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dxa [M, R], float32, and dB in B's dtype."""
    if not (needs_dxa or needs_dB):
        return None, None
    dyb, dB = torch.ops.hqqlora.lora_factor_gradients(
        dy, xa if needs_dB else None, _factor(B, dy.dtype), scaling, needs_dxa, needs_dB
    )
    dxa = dyb if scaling == 1.0 else dyb * scaling
    return (dxa if needs_dxa else None), (dB.to(B.dtype) if needs_dB else None)


class FirstOfShared(Function):
    """Inputs: x, W_q, scale, zero, bias, B, scaling, the format (out_features to axis); then A
    of this layer and of the others. Outputs: y, and xa of the others."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        y, xa, others = _forward_first(inputs)
        x, W_q, scale, zero, bias, B, ctx.scaling, *ctx.format = inputs[:FIRST_INPUTS]
        needs = ctx.needs_input_grad
        ctx.save_for_backward(
            x if any(needs[FIRST_INPUTS:]) else None,
            xa if needs[5] else None,
            *(W_q, scale, zero, B, *inputs[FIRST_INPUTS:]),
        )
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.x_dtype, ctx.leading = x.dtype, x.shape[:-1]
        ctx.set_materialize_grads(False)
        return (y, *others)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dxas: Tensor | None) -> Any:
        needs_dx, _, _, _, needs_db, needs_dB = ctx.needs_input_grad[:6]
        needs_dA = ctx.needs_input_grad[FIRST_INPUTS:]
        saved = ctx.saved_tensors
        x, xa, W_q, scale, zero, B, *As = saved
        dB = db = None
        own: Tensor | None = None
        if dy is not None:
            wants_dxa = needs_dx or any(needs_dA)
            own, dB = _factor_gradients(dy, xa, B, ctx.scaling, wants_dxa, needs_dB)
            db = bias_gradient(dy, ctx.bias_dtype) if needs_db else None
        # a layer that was not called, or whose y led nowhere, has no gradients
        called = [i for i, dxa in enumerate((own, *dxas)) if dxa is not None]
        gradients: list[Tensor | None] = [None] * len(As)
        dx: Tensor | None = None
        if called and (needs_dx or any(needs_dA[i] for i in called)):
            dxa = torch.cat([d for d in (own, *dxas) if d is not None], 1)
            if dy is None:  # y led nowhere: there is no dy W
                dy = dxa.new_zeros((*ctx.leading, ctx.format[0]), dtype=ctx.x_dtype)
            A = _stacked([As[i] for i in called], ctx.x_dtype)
            dx, dA = torch.ops.hqqlora.lora_input_gradients(
                dy, dxa, x, W_q, scale, zero, A, 1.0, *ctx.format, needs_dx, any(needs_dA)
            )
            dx = dx if needs_dx else None
            if any(needs_dA):
                parts = dA.split([As[i].shape[0] for i in called])
                for i, part in zip(called, parts, strict=True):
                    gradients[i] = part.to(As[i].dtype) if needs_dA[i] else None
        dx, db, dB, *gradients = refuse_second_derivative(
            (dx, db, dB, *gradients), (dy, *dxas, *saved)
        )
        return dx, None, None, None, db, dB, *(None,) * (FIRST_INPUTS - 6), *gradients


class OtherOfShared(Function):
    """Inputs: x, xa, W_q, scale, zero, bias, B, scaling, then the format."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _, xa, W_q, scale, zero, bias, B, ctx.scaling, *ctx.format = inputs
        ctx.save_for_backward(xa if ctx.needs_input_grad[6] else None, W_q, scale, zero, B)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward_other(inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        needs_dx, needs_dxa, _, _, _, needs_db, needs_dB = ctx.needs_input_grad[:7]
        saved = ctx.saved_tensors
        xa, W_q, scale, zero, B = saved
        dx = None
        if needs_dx:
            dx = torch.ops.hqqlora.linear_dgrad(dy, W_q, scale, zero, *ctx.format)
        dxa, dB = _factor_gradients(dy, xa, B, ctx.scaling, needs_dxa, needs_dB)
        db = bias_gradient(dy, ctx.bias_dtype) if needs_db else None
        dx, dxa, db, dB = refuse_second_derivative((dx, dxa, db, dB), (dy, *saved))
        return dx, dxa, None, None, None, db, dB, *(None,) * (OTHER_INPUTS - 7)
