"""A little attention whose q, k and v share their input, what runs in it, and how far its
results may be off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from oracle import smallest, summation, unit_roundoff
from peft_models import operations
from torch import Tensor, nn

import hqqlora

NAMES = ("q_proj", "k_proj", "v_proj")
# what runs in a forward pass of all three
SHARED = {"lora_project": 1, "lora_linear_from_xa": 3}
WIDTHS = (64, 32, 48)
RANKS = (4, 3, 8)
K = 64


class Attention(nn.Module):
    """Three layers with adapters of their own ranks and scalings; forward gives their y."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        factors: torch.dtype = torch.float32,
        ranks: Sequence[int] = RANKS,
        **options: Any,
    ) -> None:
        super().__init__()
        config = hqqlora.BaseQuantizeConfig(nbits=4, group_size=32)
        for name, N, r in zip(NAMES, WIDTHS, ranks, strict=True):
            base = hqqlora.HQQLinear(nn.Linear(K, N, dtype=dtype), config, compute_dtype=dtype)
            layer = hqqlora.LoRALinear(
                base, r, lora_alpha=2 * r, dtype=factors, init_lora_weights=False, **options
            )
            self.add_module(name, layer)

    def forward(self, x: Tensor, order: Sequence[str] = NAMES) -> dict[str, Tensor]:
        """y of the layers in `order`."""
        return {name: getattr(self, name)(x) for name in order}

    @property
    def layers(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in NAMES}


def rows(dtype: torch.dtype = torch.float32, M: int = 10, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, M // 2, K, generator=generator).to(dtype).requires_grad_()


def run(
    model: nn.Module, x: Tensor, call: Callable[[Tensor], dict[str, Tensor]] | None = None
) -> dict[str, Tensor]:
    """Outputs, and all gradients for one fixed dy of each output."""
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    ys = (call or model)(x)
    generator = torch.Generator().manual_seed(9)
    dys = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in ys.values()]
    torch.autograd.backward(list(ys.values()), dys)
    found = {f"y of {name}": y.detach() for name, y in ys.items()}
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {**found, "dx": x.grad, **{f"dy of {n}": d for n, d in zip(ys, dys, strict=True)}}


def forward_operations(call: Callable[[], Any]) -> dict[str, int]:
    """How often each of our operations ran in `call`."""
    with operations() as seen:
        call()
    return dict(seen.counts)


def is_shared(model: nn.Module, x: Tensor) -> bool:
    return forward_operations(lambda: model(x)) == SHARED


def bounds(model: Attention, x: Tensor, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far the results with and without sharing may be apart: each is off by its own
    roundings. dx: of each layer's part to x's dtype and of their sum, and the float32 sums of
    the adapters' part; dA: dy B and the sum over the tokens. All else is bit for bit."""
    X = x.detach().double().reshape(-1, K).abs()
    size = torch.zeros(X.shape, dtype=torch.float64)
    limits: dict[str, Tensor] = {}
    for name, layer in model.layers.items():
        dy = found[f"dy of {name}"].double().reshape(X.shape[0], -1).abs()
        A, B = layer.lora_A.detach().double().abs(), layer.lora_B.detach().double().abs()
        dyb = layer.scaling * dy @ B
        size += dy @ layer.base_layer.dequantize(torch.float32).double().abs() + dyb @ A
        sums = summation(dy.shape[1]) + summation(X.shape[0])
        limits[f"{name}.lora_A"] = (sums + 2 * unit_roundoff(layer.lora_A.dtype)) * dyb.T @ X
    roundings = 2 * (len(NAMES) + 3) * unit_roundoff(x.dtype) + 2 * summation(max(WIDTHS))
    limits["dx"] = (roundings * size + smallest(x.dtype)).reshape(x.shape)
    return limits


def assert_as_unshared(
    found: dict[str, Tensor], expected: dict[str, Tensor], limits: dict[str, Tensor]
) -> None:
    """Bit for bit, but for what has a limit."""
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        left = found[name]
        assert left.dtype == right.dtype, name
        assert left.shape == right.shape, name
        assert left.isfinite().all(), name
        assert right.any(), name
        if name in limits:
            excess = (left.double() - right.double()).abs() - limits[name]
            assert excess.max() <= 0, (name, excess.max())
        else:
            assert torch.equal(left, right), name
