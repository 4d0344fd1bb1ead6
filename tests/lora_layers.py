"""A little adapted layer, what it computes by the formula, and adapters as after training."""

from __future__ import annotations

from typing import Any

import hqq_layers
import torch
from torch import Tensor, nn

from hqqlora import HQQLinear, LoRALinear, lora_parameters

N, K = 48, 64


def quantized_layer(
    bias: bool = True,
    compute_dtype: torch.dtype = torch.float32,
    meta_dtype: torch.dtype | None = None,
    **config: Any,
) -> HQQLinear:
    return hqq_layers.quantized_layer(
        N, K, bias, compute_dtype, meta_dtype, **{"group_size": 32, **config}
    )


def adapted_layer(bias: bool = True, **options: Any) -> LoRALinear:
    """A layer whose adapter is not zero."""
    layer = LoRALinear(quantized_layer(bias), **{"r": 4, "lora_alpha": 8, **options})
    with torch.no_grad():
        layer.lora_B.normal_(std=0.2)
        if layer.lora_bias is not None:
            layer.lora_bias.normal_()
    return layer


def formula(layer: LoRALinear, x: Tensor) -> Tensor:
    """y in float64, from the dequantized weight; differentiable."""
    base = layer.base_layer
    y = x.double() @ base.dequantize(torch.float32).double().T
    if base.bias is not None:
        y = y + base.bias.double()
    y = y + layer.scaling * (x.double() @ layer.lora_A.double().T @ layer.lora_B.double().T)
    if layer.lora_bias is not None:
        y = y + layer.scaling * layer.lora_bias.double()
    return y


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    eps = max(torch.finfo(dtype or actual.dtype).eps, 128 * torch.finfo(torch.float32).eps)
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= 4 * eps * expected.abs().max().item()


def trained(model: nn.Module) -> nn.Module:
    """The model with adapters that do something, as after training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(std=0.3)
    return model
