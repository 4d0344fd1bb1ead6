"""Who computes the same as an op of hqqlora's, and how.

    hqqlora          4 bits, groups of 64 along a row (axis 1); "axis 0": down a column
    dense            torch on the 16-bit weight; LoRA as torch ops beside it
    hqq              hqq's own HQQLinear: dequantizes the whole weight, then a dense product
    bitsandbytes     NF4, blocks of 64; for a gradient it dequantizes the whole weight

Every LoRA but hqqlora's is a chain of torch ops in x's own dtype: the fastest that a script can
write by hand, and without the copy of x to fp32 that PEFT makes where A and B are fp32.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import layers
import torch
import torch.nn.functional as F
from timing import Contender
from torch import Tensor

import hqqlora.autograd
from hqqlora.ops import PackedWeight, Solver

RANK = 16
SCALING = 2.0
GROUP = 64
Contenders = dict[str, Contender]
ops: Any = torch.ops.hqqlora


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@dataclass
class Weights:
    """One random weight in all its forms."""

    N: int
    K: int
    dtype: torch.dtype
    device: str
    peers: tuple[str, ...] = ("hqq", "bitsandbytes")
    nbits: int = 4
    dense: Tensor = field(init=False)
    packed: dict[int, PackedWeight] = field(init=False)
    """By axis."""
    hqq: Any = None
    nf4: Any = None
    """bitsandbytes' packed weight and its state."""
    A: Tensor = field(init=False)
    B: Tensor = field(init=False)

    def __post_init__(self) -> None:
        def random(*shape: int, size: float) -> Tensor:
            return (torch.randn(*shape, device=self.device) * size).to(self.dtype)

        self.dense = random(self.N, self.K, size=0.02)
        self.A = random(RANK, self.K, size=self.K**-0.5)
        self.B = random(self.N, RANK, size=0.01)
        self.packed = {
            axis: layers.quantize(self.dense, self.nbits, GROUP, axis) for axis in (1, 0)
        }
        if "hqq" in self.peers and installed("hqq"):
            self.hqq = layers.hqq_layer(self.packed[1], self.dtype)
        if self.bitsandbytes_serves:
            import bitsandbytes.functional as bnb

            self.nf4 = bnb.quantize_4bit(self.dense, blocksize=GROUP, quant_type="nf4")

    @property
    def bitsandbytes_serves(self) -> bool:
        wanted = "bitsandbytes" in self.peers and self.device == "cuda" and self.nbits == 4
        return wanted and installed("bitsandbytes")

    def random_rows(self, M: int, width: int) -> Tensor:
        return torch.randn(M, width, device=self.device).to(self.dtype)

    # ---- the base product and its gradient, each peer's way --------------------------------

    def products(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """x -> x W^T"""
        found: dict[str, Callable[[Tensor], Tensor]] = {
            "hqqlora": lambda x: ops.linear(x, *self.packed[1][:3], None, *self.packed[1][3:]),
            "hqqlora axis 0": lambda x: ops.linear(
                x, *self.packed[0][:3], None, *self.packed[0][3:]
            ),
            "dense": lambda x: F.linear(x, self.dense),
        }
        if self.hqq is not None:
            found["hqq"] = lambda x: self.hqq.forward(x)
        if self.nf4 is not None:
            import bitsandbytes as bnb

            packed, state = self.nf4
            found["bitsandbytes"] = lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state)
        return found

    def gradients(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """dy -> dy W"""
        found: dict[str, Callable[[Tensor], Tensor]] = {
            "hqqlora": lambda dy: ops.linear_dgrad(dy, *self.packed[1]),
            "hqqlora axis 0": lambda dy: ops.linear_dgrad(dy, *self.packed[0]),
            "dense": lambda dy: dy @ self.dense,
        }

        def whole(read: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda dy: dy @ read()

        readers = self.readers()
        return found | {
            name: whole(readers[name]) for name in ("hqq", "bitsandbytes") if name in readers
        }

    def readers(self) -> dict[str, Callable[[], Tensor]]:
        """-> W"""
        found: dict[str, Callable[[], Tensor]] = {
            "hqqlora": lambda: ops.dequantize(*self.packed[1], self.dtype),
            "hqqlora axis 0": lambda: ops.dequantize(*self.packed[0], self.dtype),
            "dense": lambda: self.dense.clone(),
        }
        if self.hqq is not None:
            found["hqq"] = lambda: self.hqq.dequantize()
        if self.nf4 is not None:
            import bitsandbytes.functional as bnb

            found["bitsandbytes"] = lambda: bnb.dequantize_4bit(*self.nf4)
        return found


def _each_round(work: Callable[..., object], *arguments: object) -> Contender:
    """The same in every round."""
    return lambda i: work(*arguments)


def _fused(name: str) -> bool:
    return name.startswith("hqqlora")


def _axis(name: str) -> int:
    return 0 if name.endswith("axis 0") else 1


# ---- each op: weights and M -> contenders ----------------------------------------------


def quantize(w: Weights, M: int) -> Contenders:
    def ours(solver: Solver) -> Contender:
        return lambda i: ops.quantize(w.dense, w.nbits, GROUP, 1, w.dtype, solver)

    found = {"hqqlora": ours(Solver.DEFAULT), "hqqlora minmax": ours(Solver.MINMAX)}
    if w.hqq is not None:
        from hqq.core.quantize import Quantizer

        found["hqq"] = lambda i: Quantizer.quantize(
            w.dense, nbits=w.nbits, group_size=GROUP, axis=1, device=w.device
        )
    if w.nf4 is not None:
        import bitsandbytes.functional as bnb

        found["bitsandbytes"] = lambda i: bnb.quantize_4bit(
            w.dense, blocksize=GROUP, quant_type="nf4"
        )
    return found


def dequantize(w: Weights, M: int) -> Contenders:
    return {name: _each_round(read) for name, read in w.readers().items()}


def linear(w: Weights, M: int) -> Contenders:
    x = w.random_rows(M, w.K)
    return {name: _each_round(product, x) for name, product in w.products().items()}


def linear_dgrad(w: Weights, M: int) -> Contenders:
    dy = w.random_rows(M, w.N)
    return {name: _each_round(gradient, dy) for name, gradient in w.gradients().items()}


def _apart(product: Callable[[Tensor], Tensor], x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """A product, and a LoRA beside it as torch ops."""
    return torch.addmm(product(x), F.linear(x, A), B.t(), alpha=SCALING)


def lora_linear(w: Weights, M: int) -> Contenders:
    x = w.random_rows(M, w.K)

    def ours(p: PackedWeight) -> object:
        return ops.lora_linear(x, *p[:3], None, w.A, w.B, None, SCALING, 0.0, *p[3:])

    return {
        name: _each_round(ours, w.packed[_axis(name)])
        if _fused(name)
        else _each_round(_apart, product, x, w.A, w.B)
        for name, product in w.products().items()
    }


def lora_linear_backward(w: Weights, M: int) -> Contenders:
    """dx, dA and dB from dy, x and xa = x A^T."""
    x, dy = w.random_rows(M, w.K), w.random_rows(M, w.N)
    xa = x @ w.A.t()
    xa32 = xa.float()

    def ours(p: PackedWeight) -> Contender:
        return lambda i: ops.lora_linear_backward(
            dy, x, xa32, *p[:3], w.A, w.B, None, SCALING, 0.0, *p[3:], True, True, True
        )

    def theirs(gradient: Callable[[Tensor], Tensor]) -> Contender:
        def run(i: int) -> tuple[Tensor, Tensor, Tensor]:
            scaled = dy @ w.B * SCALING
            dx = torch.addmm(gradient(dy), scaled, w.A)
            return dx, scaled.t() @ x, dy.t() @ xa * SCALING

        return run

    return {
        name: ours(w.packed[_axis(name)]) if _fused(name) else theirs(gradient)
        for name, gradient in w.gradients().items()
    }


def lora_step(w: Weights, M: int) -> Contenders:
    """Forward and backward through autograd, as a training step has them."""
    x = w.random_rows(M, w.K).requires_grad_()
    dy = w.random_rows(M, w.N)
    A, B = w.A.clone().requires_grad_(), w.B.clone().requires_grad_()

    def step(forward: Callable[..., Tensor], *arguments: object) -> None:
        forward(*arguments).backward(dy)  # type: ignore[no-untyped-call]
        x.grad = A.grad = B.grad = None

    def ours(p: PackedWeight) -> Tensor:
        return hqqlora.autograd.lora_linear(x, p, None, A, B, SCALING, 0.0)

    return {
        name: _each_round(step, ours, w.packed[_axis(name)])
        if _fused(name)
        else _each_round(step, _apart, product, x, A, B)
        for name, product in w.products().items()
    }


OPS: dict[str, Callable[[Weights, int], Contenders]] = {
    "linear": linear,
    "linear_dgrad": linear_dgrad,
    "lora_step": lora_step,
    "lora_linear": lora_linear,
    "lora_linear_backward": lora_linear_backward,
    "dequantize": dequantize,
    "quantize": quantize,
}
WITHOUT_ROWS = ("dequantize", "quantize")
"""Ops that know no M."""
