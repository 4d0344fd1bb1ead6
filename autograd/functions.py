# ruff: noqa: D102 (the methods are those of torch.autograd.Function)
"""The derivatives of the products with a frozen weight.

What each function keeps for its backward pass:

- references to ``W_q``, ``scale`` and ``zero``, never a dequantized copy;
- ``x`` only where ``A`` needs a gradient (the dropout mask is drawn again from its seed);
- ``xa = drop(x) A^T``, R numbers a token, only where ``B`` needs one;
- references to ``A`` and ``B``; where the ops take them in another dtype alone, they are cast
  for the time of each call.

Each product comes twice. ``Linear`` and ``LoRALinear`` save in their forward, which costs a
third of a separate ``setup_context`` (some 5 against 13 microseconds a call); the latter is
what torch.func asks for, and lives in ``TransformableLinear`` and ``TransformableLoRALinear``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

# The inputs of `Linear` and `LoRALinear`, as backward has to answer them one by one.
LINEAR_INPUTS = 10
LORA_INPUTS = 15

_FACTOR_DTYPES = {torch.float32, torch.bfloat16, torch.float16}

Gradients = tuple[Tensor | None, ...]


class _SecondDerivative(Function):
    """Passes the first `count` tensors, gradients, through, as if they had been made from the
    rest; refuses to differentiate them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.detach() for gradient in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "hqqlora: the gradients of a quantized layer cannot be differentiated again: "
            "double backward is not supported"
        )


def refuse_second_derivative(gradients: Gradients, sources: tuple[Any, ...]) -> Gradients:
    """Under create_graph the gradients would pass for constants, as the ops that made them
    are not differentiable: let a second backward through them fail instead."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients  # (torch.compile refuses double backward itself)
    tracked = [s for s in sources if isinstance(s, Tensor) and s.requires_grad]
    if not tracked:
        return gradients
    present = [g for g in gradients if g is not None]
    marked = iter(
        _SecondDerivative.apply(len(present), *present, *tracked)  # type: ignore[no-untyped-call]
    )
    return tuple(None if g is None else next(marked) for g in gradients)


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of dy over the tokens."""
    rows = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1])
    return rows.sum(0, dtype=dtype)


# ---- y = x W^T + bias ------------------------------------------------------------------


def _save_linear(ctx: Any, inputs: tuple[Any, ...]) -> None:
    _, W_q, scale, zero, bias, *ctx.format = inputs
    ctx.save_for_backward(W_q, scale, zero)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, dy: Tensor) -> Gradients:
    W_q, scale, zero = ctx.saved_tensors
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.hqqlora.linear_dgrad(dy, W_q, scale, zero, *ctx.format)
    if ctx.needs_input_grad[4]:
        db = bias_gradient(dy, ctx.bias_dtype)
    dx, db = refuse_second_derivative((dx, db), (dy,))
    return dx, None, None, None, db, *(None,) * (LINEAR_INPUTS - 5)


class Linear(Function):
    """Inputs: x, W_q, scale, zero, bias, then the format (out_features to axis)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_linear(ctx, inputs)
        y: Tensor = torch.ops.hqqlora.linear(*inputs)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _linear_backward(ctx, dy)


class TransformableLinear(Function):
    """`Linear` for torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        y: Tensor = torch.ops.hqqlora.linear(*inputs)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save_linear(ctx, inputs)
        ctx.save_for_forward(*inputs[1:4])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _linear_backward(ctx, dy)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, *others: Any) -> Tensor | None:
        db = others[3]
        if dx is None:
            raise RuntimeError("hqqlora: forward-mode derivatives need a tangent of x")
        dy: Tensor = torch.ops.hqqlora.linear(dx, *ctx.saved_tensors, None, *ctx.format)
        return dy if db is None else dy + db


# ---- y = x W^T + bias + scaling * (drop(x) A^T) B^T ------------------------------------


def factors_for(dtype: torch.dtype, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B as the ops take them for an x of dtype: in that, or in float32. What is no
    factor's dtype stays, for the ops to refuse."""
    if A.dtype in (dtype, torch.float32) and B.dtype == A.dtype:
        return A, B
    if not {A.dtype, B.dtype} <= _FACTOR_DTYPES:
        return A, B
    return A.float(), B.float()


def forward_lora(inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """y and xa of the inputs of `LoRALinear`."""
    x, W_q, scale, zero, bias, A, B, *rest = inputs
    A, B = factors_for(x.dtype, A, B)
    y, xa = torch.ops.hqqlora.lora_linear(x, W_q, scale, zero, bias, A, B, *rest)
    return y, xa


def _save_lora(ctx: Any, inputs: tuple[Any, ...], xa: Tensor) -> None:
    x, W_q, scale, zero, bias, A, B, seed, *ctx.numbers = inputs
    needs_dA, needs_dB = ctx.needs_input_grad[5:7]
    ctx.save_for_backward(
        x if needs_dA else None, xa if needs_dB else None, W_q, scale, zero, A, B, seed
    )
    ctx.bias_dtype = None if bias is None else bias.dtype


def _lora_backward(ctx: Any, dy: Tensor) -> Gradients:
    needs_dx, _, _, _, needs_db, needs_dA, needs_dB, *_ = ctx.needs_input_grad
    saved = ctx.saved_tensors
    dx = dA = dB = db = None
    if needs_dx or needs_dA or needs_dB:
        *before, A, B, seed = saved
        factors = factors_for(dy.dtype, A, B)
        dx, dA, dB = torch.ops.hqqlora.lora_linear_backward(
            dy, *before, *factors, seed, *ctx.numbers, needs_dx, needs_dA, needs_dB
        )
        dA, dB = dA.to(A.dtype), dB.to(B.dtype)
    if needs_db:
        db = bias_gradient(dy, ctx.bias_dtype)
    dx, db, dA, dB = refuse_second_derivative(
        (
            dx if needs_dx else None,
            db,
            dA if needs_dA else None,
            dB if needs_dB else None,
        ),
        (dy, *saved),
    )
    return dx, None, None, None, db, dA, dB, *(None,) * (LORA_INPUTS - 7)


class LoRALinear(Function):
    """Inputs: x, W_q, scale, zero, bias, A, B, seed, scaling, dropout, then the format."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, xa = forward_lora(inputs)
        _save_lora(ctx, inputs, xa)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _lora_backward(ctx, dy)


class TransformableLoRALinear(Function):
    """`LoRALinear` for torch.func, which saves nothing that is not an output: hence xa."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return forward_lora(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        _save_lora(ctx, inputs, output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> Any:
        return _lora_backward(ctx, dy)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError("hqqlora: lora_linear has no forward-mode derivative")
