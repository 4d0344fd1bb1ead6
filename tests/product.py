"""A weight, an adapter and inputs, and their products by any implementation of the ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from oracle import Adapter, Oracle, dgrad_of, dropout_mask, linear_of
from torch import Tensor

RESULTS = ("y", "dx", "y with LoRA", "xa", "dx with LoRA", "dA", "dB")


@dataclass(frozen=True)
class Product:
    """A weight with an adapter and inputs of M rows."""

    weight: Oracle
    adapter: Adapter
    x: Tensor
    dy: Tensor
    seed: Tensor
    dropout: float

    @property
    def packed(self) -> tuple:
        return self.weight.packed[:3]

    @property
    def numbers(self) -> tuple:
        return self.weight.packed[3:]

    def factors(self) -> tuple:
        return self.adapter.A, self.adapter.B, self.seed, self.adapter.scaling, self.dropout

    def linear(self, ops) -> Tensor:
        return ops.linear(self.x, *self.packed, None, *self.numbers)

    def dgrad(self, ops) -> Tensor:
        return ops.linear_dgrad(self.dy, *self.packed, *self.numbers)

    def lora(self, ops) -> tuple[Tensor, Tensor]:
        """y and xa."""
        return ops.lora_linear(self.x, *self.packed, None, *self.factors(), *self.numbers)

    def lora_backward(self, ops, xa: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dA and dB."""
        return ops.lora_linear_backward(
            self.dy, self.x, xa, *self.packed, *self.factors(), *self.numbers, True, True, True
        )

    def results(self, ops) -> list[Tensor]:
        """As RESULTS names them."""
        y, xa = self.lora(ops)
        return [self.linear(ops), self.dgrad(ops), y, xa, *self.lora_backward(ops, xa)]

    def expected(self) -> list[tuple[Tensor, Tensor]]:
        """Of `results`: in float64, each with its bound."""
        return [
            linear_of(self.x, self.weight),
            dgrad_of(self.dy, self.weight),
            *self.adapter.forward(self.x, self.weight),
            *self.adapter.backward(self.dy, self.x, self.weight),
        ]


def eighths(rows: int, width: int, source: torch.Generator) -> Tensor:
    """Multiples of 1/8 up to 1 in size: sums of two are exact in every dtype."""
    return torch.randint(-8, 9, (rows, width), generator=source) / 8


def random_product(
    weight: Oracle,
    M: int,
    R: int,
    dtype: torch.dtype,
    factors: torch.dtype,
    dropout: float,
    seed: int,
) -> Product:
    """x [M, K] and dy [M, N] of dtype, A [R, K] and B [N, R] of `factors`."""
    N, K = weight.packed.out_features, weight.packed.in_features
    source = torch.Generator().manual_seed(seed)
    A = (torch.randn(R, K, generator=source) / K**0.5).to(factors)
    B = (torch.randn(N, R, generator=source) * 0.1).to(factors)
    drawn = torch.tensor([seed])
    mask = dropout_mask(M, K, dropout, drawn) if dropout else None
    x, dy = (eighths(M, width, source).to(dtype) for width in (K, N))
    return Product(weight, Adapter(A, B, 0.7, mask), x, dy, drawn, dropout)
