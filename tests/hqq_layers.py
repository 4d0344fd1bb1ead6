"""Little quantized layers for tests, and what makes two of them equal."""

from typing import Any

import torch
from torch import nn

from hqqlora import BaseQuantizeConfig, HQQLinear


def dense_layer(
    out_features: int = 64, in_features: int = 128, bias: bool = True, seed: int = 0
) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias=bias)


def quantized_layer(
    out_features: int = 64,
    in_features: int = 128,
    bias: bool = True,
    compute_dtype: torch.dtype = torch.float32,
    meta_dtype: torch.dtype | None = None,
    seed: int = 0,
    **config: Any,
) -> HQQLinear:
    dense = dense_layer(out_features, in_features, bias, seed)
    return HQQLinear(
        dense,
        BaseQuantizeConfig(**config),
        compute_dtype=compute_dtype,
        meta_dtype=meta_dtype,
    )


def hqqs_layer(
    compute_dtype: torch.dtype = torch.float32, bias: bool = True, **config: Any
) -> Any:
    """The same dense layer, quantized by the hqq package."""
    from hqq.core import quantize

    settings = quantize.BaseQuantizeConfig(**{"group_size": 32, **config})
    dense = dense_layer(bias=bias)
    return quantize.HQQLinear(dense, settings, compute_dtype=compute_dtype, device="cpu")


def assert_same_layer(a: HQQLinear, b: HQQLinear) -> None:
    """Equal in format, dtypes and every bit."""
    assert a.quant_config == b.quant_config
    assert a.compute_dtype == b.compute_dtype
    assert (a.out_features, a.in_features) == (b.out_features, b.in_features)
    assert [name for name, _ in a.named_parameters()] == [n for n, _ in b.named_parameters()]
    for mine, other in zip(a.parameters(), b.parameters(), strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)
