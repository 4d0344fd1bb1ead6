"""What the ops return for tensors without data: for torch.compile and meta tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .adapter_checks import check_adapter, check_factor, check_given, check_saved, factor_size
from .checks import (
    check,
    check_bias,
    check_floating,
    check_format,
    check_importance,
    check_packed,
    check_planes,
    check_quantize_options,
    check_rows,
    check_weight,
    rows_of,
    shape_of,
)
from .grouped_fakes import (
    grouped_linear,
    grouped_linear_dgrad,
    grouped_lora_linear,
    grouped_lora_linear_backward,
)
from .weight import meta_shape, packed_shape, planes_shape, word_dtype


def quantize(
    weight: Tensor,
    nbits: int,
    group_size: int,
    axis: int,
    meta_dtype: torch.dtype,
    solver: int = 0,
    iters: int = 20,
    early_stop: bool = True,
    round_zero: bool = False,
    lp_norm: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.0,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """weight [N,K] -> W_q, scale, zero."""
    check_floating("weight", weight.dtype)
    check(
        weight.dim() == 2,
        lambda: f"weight must have shape [out_features, in_features], got {shape_of(weight)}",
    )
    out_features, in_features = weight.shape
    check_format(out_features, in_features, nbits, group_size, axis)
    check_floating("meta_dtype", meta_dtype)
    check_quantize_options(solver, iters, lp_norm, beta, kappa)
    if importance is not None:
        check_importance(importance, solver, in_features, weight.device)
    packed = packed_shape(out_features, in_features, nbits, group_size, axis)
    meta = meta_shape(out_features, in_features, group_size, axis)
    return (
        weight.new_empty(packed, dtype=word_dtype(nbits)),
        weight.new_empty(meta, dtype=meta_dtype),
        weight.new_empty(meta, dtype=meta_dtype),
    )


def dequantize(
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    out_features: int,
    in_features: int,
    nbits: int,
    group_size: int,
    axis: int,
    dtype: torch.dtype,
) -> Tensor:
    """W [N,K] in dtype."""
    check_weight(
        W_q, scale, zero, out_features, in_features, nbits, group_size, axis, W_q.device
    )
    check_floating("dtype", dtype)
    return W_q.new_empty((out_features, in_features), dtype=dtype)


def repack(
    W_q: Tensor,
    out_features: int,
    in_features: int,
    nbits: int,
    group_size: int,
    axis: int,
    planes: bool,
) -> Tensor:
    """W_q of 3 bits in planes, or in hqq's words."""
    weight = (out_features, in_features, nbits, group_size, axis)
    check_packed(W_q, *weight, W_q.device)
    check(nbits == 3, lambda: f"nbits must be 3 to be packed in another way, got {nbits}")
    if planes:
        check_planes("the result", *weight)
        return W_q.new_empty(planes_shape(*weight), dtype=torch.uint8)
    return W_q.new_empty(packed_shape(*weight), dtype=word_dtype(nbits))


def linear(
    x: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    nbits: int,
    group_size: int,
    axis: int,
) -> Tensor:
    """y [...,N]."""
    check_weight(W_q, scale, zero, out_features, in_features, nbits, group_size, axis, x.device)
    check_rows("x", x, in_features, "in_features")
    check_bias(bias, out_features, x)
    return x.new_empty((*x.shape[:-1], out_features))


def linear_dgrad(
    dy: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    out_features: int,
    in_features: int,
    nbits: int,
    group_size: int,
    axis: int,
) -> Tensor:
    """dx [...,K]."""
    check_weight(
        W_q, scale, zero, out_features, in_features, nbits, group_size, axis, dy.device
    )
    check_rows("dy", dy, out_features, "out_features")
    return dy.new_empty((*dy.shape[:-1], in_features))


def lora_linear(
    x: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    out_features: int,
    in_features: int,
    nbits: int,
    group_size: int,
    axis: int,
) -> tuple[Tensor, Tensor]:
    """y [...,N] and xa [M,R]."""
    check_weight(W_q, scale, zero, out_features, in_features, nbits, group_size, axis, x.device)
    check_rows("x", x, in_features, "in_features")
    check_bias(bias, out_features, x)
    check_adapter(A, B, out_features, in_features, seed, scaling, dropout, "x", x)
    return (
        x.new_empty((*x.shape[:-1], out_features)),
        x.new_empty((rows_of(x), A.shape[0]), dtype=torch.float32),
    )


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    xa: Tensor | None,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    A: Tensor,
    B: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    out_features: int,
    in_features: int,
    nbits: int,
    group_size: int,
    axis: int,
    needs_dx: bool,
    needs_dA: bool,
    needs_dB: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [...,K], dA [R,K], dB [N,R]; [0] for those that are not needed."""
    check_weight(
        W_q, scale, zero, out_features, in_features, nbits, group_size, axis, dy.device
    )
    check_rows("dy", dy, out_features, "out_features")
    check_adapter(A, B, out_features, in_features, seed, scaling, dropout, "dy", dy)
    check_saved(dy, x, xa, in_features, A.shape[0], needs_dA, needs_dB)
    dx = dy.new_empty((*dy.shape[:-1], in_features) if needs_dx else (0,))
    dA = A.new_empty(A.shape if needs_dA else (0,))
    dB = A.new_empty((out_features, A.shape[0]) if needs_dB else (0,))
    return dx, dA, dB


def lora_project(x: Tensor, A: Tensor) -> Tensor:
    """xa [M,R]."""
    in_features = factor_size("A", A, 1)
    check_rows("x", x, in_features, "in_features")
    rank = check_factor("A", A, in_features, 1.0, "x", x)
    return x.new_empty((rows_of(x), rank), dtype=torch.float32)


def lora_linear_from_xa(
    x: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    xa: Tensor,
    B: Tensor,
    scaling: float,
    out_features: int,
    in_features: int,
    nbits: int,
    group_size: int,
    axis: int,
) -> Tensor:
    """y [...,N], of an xa [M,R] that is known already."""
    check_weight(W_q, scale, zero, out_features, in_features, nbits, group_size, axis, x.device)
    check_rows("x", x, in_features, "in_features")
    check_bias(bias, out_features, x)
    rank = check_factor("B", B, out_features, scaling, "x", x)
    check_given("xa", xa, rows_of(x), rank, x.device)
    return x.new_empty((*x.shape[:-1], out_features))


def lora_factor_gradients(
    dy: Tensor, xa: Tensor | None, B: Tensor, scaling: float, needs_dyb: bool, needs_dB: bool
) -> tuple[Tensor, Tensor]:
    """dyb [M,R] and dB [N,R]; [0] for those that are not needed."""
    out_features = factor_size("B", B, 0)
    check_rows("dy", dy, out_features, "out_features")
    rank = check_factor("B", B, out_features, scaling, "dy", dy)
    check(not needs_dB or xa is not None, lambda: "dB needs xa")
    if xa is not None:
        check_given("xa", xa, rows_of(dy), rank, dy.device)
    dyb = dy.new_empty((rows_of(dy), rank) if needs_dyb else (0,), dtype=torch.float32)
    return dyb, B.new_empty(B.shape if needs_dB else (0,))


def lora_input_gradients(
    dy: Tensor,
    dyb: Tensor,
    x: Tensor | None,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    A: Tensor,
    scaling: float,
    out_features: int,
    in_features: int,
    nbits: int,
    group_size: int,
    axis: int,
    needs_dx: bool,
    needs_dA: bool,
) -> tuple[Tensor, Tensor]:
    """dx [...,K], dA [R,K]; [0] for those that are not needed."""
    check_weight(
        W_q, scale, zero, out_features, in_features, nbits, group_size, axis, dy.device
    )
    check_rows("dy", dy, out_features, "out_features")
    rank = check_factor("A", A, in_features, scaling, "dy", dy)
    check_given("dyb", dyb, rows_of(dy), rank, dy.device)
    check_saved(dy, x, None, in_features, rank, needs_dA, False)
    dx = dy.new_empty((*dy.shape[:-1], in_features) if needs_dx else (0,))
    return dx, A.new_empty(A.shape if needs_dA else (0,))


FAKES = (
    quantize,
    dequantize,
    repack,
    linear,
    linear_dgrad,
    lora_linear,
    lora_linear_backward,
    lora_project,
    lora_linear_from_xa,
    lora_factor_gradients,
    lora_input_gradients,
    grouped_linear,
    grouped_linear_dgrad,
    grouped_lora_linear,
    grouped_lora_linear_backward,
)


def _refusing_cuda(fake: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """The fake, but for tensors on CUDA devices."""

    @functools.wraps(fake)
    def refusing(*arguments: Any, **keywords: Any) -> Any:
        tensors = [a for a in (*arguments, *keywords.values()) if isinstance(a, Tensor)]
        check(all(t.device.type != "cuda" for t in tensors), lambda: reason)
        return fake(*arguments, **keywords)

    return refusing


def register(no_cuda: str | None) -> None:
    """Attach the fakes to the ops. `no_cuda`: why CUDA tensors are refused while tracing too,
    if they are."""
    for fake in FAKES:
        torch.library.register_fake(
            f"hqqlora::{fake.__name__}", _refusing_cuda(fake, no_cuda) if no_cuda else fake
        )
