"""What the ops for experts return for tensors without data: see fakes.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .adapter_checks import check_adapter, check_saved
from .checks import check_routing, check_rows, check_weight


def grouped_linear(
    x: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    offsets: Tensor,
    out_features: int,
    in_features: int,
    nbits: int,
    group_size: int,
    axis: int,
) -> Tensor:
    """y [M,N]."""
    check_rows("x", x, in_features, "in_features")
    experts = check_routing(offsets, "x", x)
    shape = (out_features, in_features, nbits, group_size, axis)
    check_weight(W_q, scale, zero, *shape, x.device, experts)
    return x.new_empty((x.shape[0], out_features))


def grouped_linear_dgrad(
    dy: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    offsets: Tensor,
    out_features: int,
    in_features: int,
    nbits: int,
    group_size: int,
    axis: int,
) -> Tensor:
    """dx [M,K]."""
    check_rows("dy", dy, out_features, "out_features")
    experts = check_routing(offsets, "dy", dy)
    shape = (out_features, in_features, nbits, group_size, axis)
    check_weight(W_q, scale, zero, *shape, dy.device, experts)
    return dy.new_empty((dy.shape[0], in_features))


def grouped_lora_linear(
    x: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    offsets: Tensor,
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
    """y [M,N] and xa [M,R]."""
    check_rows("x", x, in_features, "in_features")
    experts = check_routing(offsets, "x", x)
    shape = (out_features, in_features, nbits, group_size, axis)
    check_weight(W_q, scale, zero, *shape, x.device, experts)
    check_adapter(A, B, out_features, in_features, seed, scaling, dropout, "x", x, experts)
    y = x.new_empty((x.shape[0], out_features))
    return y, x.new_empty((x.shape[0], A.shape[1]), dtype=torch.float32)


def grouped_lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    xa: Tensor | None,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    offsets: Tensor,
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
    """dx [M,K], dA [E,R,K], dB [E,N,R]; [0] for those that are not needed."""
    check_rows("dy", dy, out_features, "out_features")
    experts = check_routing(offsets, "dy", dy)
    shape = (out_features, in_features, nbits, group_size, axis)
    check_weight(W_q, scale, zero, *shape, dy.device, experts)
    check_adapter(A, B, out_features, in_features, seed, scaling, dropout, "dy", dy, experts)
    check_saved(dy, x, xa, in_features, A.shape[1], needs_dA, needs_dB)
    dx = dy.new_empty((dy.shape[0], in_features) if needs_dx else (0,))
    dA = A.new_empty(A.shape if needs_dA else (0,))
    dB = A.new_empty((experts, out_features, A.shape[1]) if needs_dB else (0,))
    return dx, dA, dB
