"""Differentiable products with a frozen HQQ weight, with and without a LoRA adapter.

Gradients flow to ``x``, ``bias``, ``A`` and ``B``, and are computed only where they are
needed; the quantized weight is frozen. Both functions work under autocast (``x`` is cast,
``A`` and ``B`` stay as they are), torch.compile, torch.utils.checkpoint, and torch.func's
``grad`` and ``vmap``. Gradients cannot be differentiated again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import PackedWeight
from .dropout_seed import dropout_seed
from .functions import (
    Linear,
    LoRALinear,
    TransformableLinear,
    TransformableLoRALinear,
    forward_lora,
)
from .grouped import grouped_linear, grouped_lora_linear
from .inputs import autocast_input, bias_for, check_frozen, transforms_active

__all__ = ["grouped_linear", "grouped_lora_linear", "linear", "lora_linear"]


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``y [..., N] = x [..., K] W^T + bias``.

    x: float32, bfloat16 or float16, any leading dimensions and strides.
    weight: frozen; N and K are its out_features and in_features.
    bias: [N], float32 or x's dtype, or None.

    Returns y in x's dtype. Raises ValueError if scale or zero requires a gradient, and
    RuntimeError, with the values, where shapes or dtypes do not fit.
    """
    check_frozen(weight)
    x = autocast_input(x)
    bias = bias_for(x, bias)
    arguments = (x, *weight[:3], bias, *weight[3:])
    y: Tensor
    if transforms_active():
        y = TransformableLinear.apply(*arguments)  # type: ignore[no-untyped-call]
    elif torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y = Linear.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        y = torch.ops.hqqlora.linear(*arguments)
    return y


def lora_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """``y [..., N] = x W^T + bias + scaling * (drop(x) A^T) B^T``.

    x: [..., K], float32, bfloat16 or float16, any leading dimensions and strides.
    weight: frozen; N and K are its out_features and in_features.
    bias: [N], float32 or x's dtype, or None.
    A, B: [R, K] and [N, R], any of the three dtypes; R up to 256. In another than float32 or
        x's they are cast to float32 for the time of the product.
    dropout: the probability, in [0, 1), that an element of x does not reach A. No mask is
        stored: a seed drawn from torch's default generator of x's device stands for it, so
        that torch.manual_seed and torch.utils.checkpoint reproduce it, and a CUDA graph has
        another mask at each replay.

    Returns y in x's dtype; dA and dB come in the dtypes of A and B. Raises ValueError if scale
    or zero requires a gradient, and RuntimeError, with the values, where shapes, dtypes or
    numbers do not fit.
    """
    check_frozen(weight)
    x = autocast_input(x)
    bias = bias_for(x, bias)
    seed = dropout_seed(x.device) if dropout > 0 else None
    arguments = (x, *weight[:3], bias, A, B, seed, scaling, dropout, *weight[3:])
    y: Tensor
    if transforms_active():
        y, _ = TransformableLoRALinear.apply(*arguments)  # type: ignore[no-untyped-call]
    elif torch.is_grad_enabled() and (
        x.requires_grad
        or A.requires_grad
        or B.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        y = LoRALinear.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        y, _ = forward_lora(arguments)
    return y
