"""What the ops must compute, in float64, and how far from it they may be.

Independent of the library: weights are read from the format's description, products are
float64 products of the dequantized weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from format_oracle import SLOTS
from torch import Tensor

from hqqlora.ops import PackedWeight

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next larger number."""
    return torch.finfo(dtype).eps / 2


def smallest(dtype: torch.dtype) -> float:
    """The distance between subnormal numbers: below it, relative errors say nothing."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


@dataclass(frozen=True)
class Oracle:
    """A packed weight together with the float64 matrix it stands for."""

    packed: PackedWeight

    @cached_property
    def codes(self) -> Tensor:
        """[N, K]. 3 bits in bytes are in planes: their upper two bits, then the lowest one."""
        _, _, _, N, K, nbits, _, _ = self.packed
        words = self.packed.W_q.reshape(-1)
        if nbits == 3 and words.dtype == torch.uint8:
            twos, ones = words.split([N * K // 4, N * K // 8])
            return (codes_of(twos, 2) * 2 + codes_of(ones, 1)).reshape(N, K)
        return codes_of(words, nbits)[: N * K].reshape(N, K)

    def per_element(self, meta: Tensor) -> Tensor:
        """scale or zero [groups] -> float64 [N, K]: element e is of group e div G (axis 1) or
        e mod groups (axis 0)."""
        _, _, _, N, K, _, G, axis = self.packed
        flat = meta.reshape(-1).double()
        flat = flat.repeat_interleave(G) if axis == 1 else flat.repeat(G)
        return flat[: N * K].reshape(N, K)

    @cached_property
    def W(self) -> Tensor:
        """(q - zero) * scale, float64 [N, K]."""
        return (self.codes - self.per_element(self.packed.zero)) * self.per_element(
            self.packed.scale
        )

    @cached_property
    def magnitude(self) -> Tensor:
        """(q + |zero|) * |scale|: what a kernel sums that takes codes and zeros apart."""
        zero = self.per_element(self.packed.zero).abs()
        return (self.codes + zero) * self.per_element(self.packed.scale).abs()


def codes_of(words: Tensor, nbits: int) -> Tensor:
    """Slot j of all words is the j-th stretch of the elements, the first slot in the highest
    bits (3 bits: of 30)."""
    shifts = range(nbits * (SLOTS[nbits] - 1), -1, -nbits)
    return torch.cat([words.to(torch.int64) >> shift & (2**nbits - 1) for shift in shifts])


def random_weight(
    N: int,
    K: int,
    G: int,
    nbits: int = 4,
    axis: int = 1,
    meta_dtype: torch.dtype = torch.float32,
) -> Oracle:
    """Words of random bits, so that every code occurs and the bits that hold none are not
    zero; scales of one magnitude; fractional zeros among the codes."""
    rows, columns = (N * K // G, G) if axis == 1 else (G, N * K // G)
    shape = (-(-rows // SLOTS[nbits]), columns)
    if nbits * SLOTS[nbits] > 8:
        W_q = torch.randint(-(2**31), 2**31, shape).to(torch.int32)
    else:
        W_q = torch.randint(0, 256, shape).to(torch.uint8)
    meta_shape = (N * K // G, 1) if axis == 1 else (1, N * K // G)
    scale = (torch.rand(meta_shape) + 0.5) * 0.1 / 2**nbits
    zero = torch.rand(meta_shape) * (2**nbits - 1)
    return Oracle(
        PackedWeight(W_q, scale.to(meta_dtype), zero.to(meta_dtype), N, K, nbits, G, axis)
    )


def summation(terms: int) -> float:
    """The relative error, in terms of the sum of absolute values, of adding so many products
    in float32. sqrt(terms) * u times a small constant: what rounding errors that do not
    conspire can reach (Higham and Mary, 2019); a bound without that assumption has `terms`
    for the root, and would hide a missing product."""
    return (4 * math.sqrt(terms) + 8) * 2.0**-24


def product_bound(
    x: Tensor, exact: Tensor, W: Tensor, magnitude: Tensor, addend: Tensor | float = 0.0
) -> Tensor:
    """How far y = x W^T + addend, or dx = dy W + addend, may be off, element by element.

    x [..., k] and the matrices [n, k] are what the product sums over; exact is the result;
    addend the part of it that bias and adapter contribute. With u of x's dtype:

        u |y|                       the result is rounded
        u |addend|                  large products find it in memory, in y's dtype
        u |x| |W|^T                 W, or x * scale, is rounded to x's dtype before the product
        (4 sqrt(k) + 8) 2^-24 |x| M^T    float32 sums of codes and of zeros, M = (q + |z|) |s|
    """
    u = unit_roundoff(x.dtype)
    absolute = x.double().abs()
    return (
        u * exact.abs()
        + u * torch.as_tensor(addend, dtype=torch.float64).abs()
        + u * (absolute @ W.abs().T)
        + summation(x.shape[-1]) * (absolute @ magnitude.T)
        + smallest(x.dtype) * (1 + absolute.sum(-1, keepdim=True))
    )


def assert_close(actual: Tensor, exact: Tensor, bound: Tensor) -> None:
    """|actual - exact| <= bound everywhere, and nothing is NaN or infinite."""
    assert actual.shape == exact.shape
    assert actual.isfinite().all()
    if actual.numel() == 0:
        return
    excess = (actual.double() - exact).abs() - bound
    worst = int(excess.argmax())
    assert excess.reshape(-1)[worst] <= 0, (
        f"element {worst} of {list(actual.shape)} is {actual.reshape(-1)[worst].item()}, "
        f"not {exact.reshape(-1)[worst].item()} +- {bound.reshape(-1)[worst].item()}; "
        f"{int((excess > 0).sum())} elements are off"
    )


# a result in float64 and how far from it an op's may be
Expected = tuple[Tensor, Tensor]


def linear_of(x: Tensor, weight: Oracle, bias: Tensor | None = None) -> Expected:
    """y = x W^T + bias."""
    addend = 0.0 if bias is None else bias.double()
    exact = x.double() @ weight.W.T + addend
    return exact, product_bound(x, exact, weight.W, weight.magnitude, addend)


def dgrad_of(dy: Tensor, weight: Oracle) -> Expected:
    """dx = dy W."""
    exact = dy.double() @ weight.W
    return exact, product_bound(dy, exact, weight.W.T, weight.magnitude.T)


def check_linear(x: Tensor, y: Tensor, weight: Oracle, bias: Tensor | None = None) -> None:
    assert y.dtype == x.dtype
    assert_close(y, *linear_of(x, weight, bias))


def check_dgrad(dy: Tensor, dx: Tensor, weight: Oracle) -> None:
    assert dx.dtype == dy.dtype
    assert_close(dx, *dgrad_of(dy, weight))


def as_rows(x: Tensor) -> Tensor:
    """[..., width] -> [M, width]; reshape(-1, width) does not know M where width is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter with its exact products. `mask` [M, K]: what dropout multiplies x with
    (0 or 1 / (1 - p)); None without dropout."""

    A: Tensor
    B: Tensor
    scaling: float
    mask: Tensor | None = None

    def dropped(self, x: Tensor) -> Tensor:
        """drop(x), float64 [M, K]."""
        rows = as_rows(x).double()
        return rows if self.mask is None else rows * self.mask

    def forward(
        self, x: Tensor, weight: Oracle, bias: Tensor | None = None
    ) -> tuple[Expected, Expected]:
        """y = x W^T + bias + scaling * (drop(x) A^T) B^T [M, N] and xa = drop(x) A^T [M, R]."""
        A, B = self.A.double(), self.B.double()
        rows, dropped = as_rows(x), self.dropped(x)
        addend = self.scaling * (dropped @ A.T) @ B.T
        if bias is not None:
            addend = addend + bias.double()
        exact = rows.double() @ weight.W.T + addend
        terms = dropped.abs() @ A.abs().T
        xa_error = summation(A.shape[1])
        bound = product_bound(rows, exact, weight.W, weight.magnitude, addend)
        bound = bound + (xa_error + summation(A.shape[0])) * abs(self.scaling) * (
            terms @ B.abs().T
        )
        return (exact, bound), (dropped @ A.T, xa_error * terms)

    def backward(
        self, dy: Tensor, x: Tensor, weight: Oracle
    ) -> tuple[Expected, Expected, Expected]:
        """dx = dy W + scaling * drop'((dy B) A) [M, K], dA = scaling * (dy B)^T drop(x),
        dB = scaling * dy^T (drop(x) A^T)."""
        A, B, s = self.A.double(), self.B.double(), self.scaling
        rows, dropped = as_rows(dy), self.dropped(x)
        exact_dy = rows.double()
        M, N, K = rows.shape[0], rows.shape[1], A.shape[1]
        mask = torch.ones(M, K, dtype=torch.float64) if self.mask is None else self.mask
        dyb, dyb_terms = exact_dy @ B, exact_dy.abs() @ B.abs()
        error = summation(N) + summation(A.shape[0])

        addend = s * (dyb @ A) * mask
        dx = exact_dy @ weight.W + addend
        dx_bound = product_bound(rows, dx, weight.W.T, weight.magnitude.T, addend)
        dx_bound = dx_bound + error * abs(s) * (dyb_terms @ A.abs()) * mask

        u = unit_roundoff(self.A.dtype)
        dA = s * dyb.T @ dropped
        dA_bound = u * dA.abs() + (error + summation(M)) * abs(s) * (
            dyb_terms.T @ dropped.abs()
        )
        dB = s * exact_dy.T @ (dropped @ A.T)
        dB_bound = u * dB.abs() + (error + summation(M) + summation(K)) * abs(s) * (
            exact_dy.abs().T @ (dropped.abs() @ A.abs().T)
        )
        least = smallest(self.A.dtype)
        return (dx, dx_bound), (dA, dA_bound + least), (dB, dB_bound + least)

    def check_forward(
        self, x: Tensor, y: Tensor, xa: Tensor, weight: Oracle, bias: Tensor | None = None
    ) -> None:
        (exact, bound), expected_xa = self.forward(x, weight, bias)
        assert y.dtype == x.dtype
        assert xa.dtype == torch.float32
        assert_close(y, exact.reshape(y.shape), bound.reshape(y.shape))
        assert_close(xa, *expected_xa)

    def check_backward(
        self, dy: Tensor, x: Tensor, gradients: tuple[Tensor | None, ...], weight: Oracle
    ) -> None:
        """dx, dA and dB; None for those not asked for."""
        expected = self.backward(dy, x, weight)
        dtypes = (dy.dtype, self.A.dtype, self.B.dtype)
        for found, (exact, bound), dtype in zip(gradients, expected, dtypes, strict=True):
            if found is not None:
                assert found.dtype == dtype
                shape = found.shape
                assert_close(found, exact.reshape(shape), bound.reshape(shape))


def random_adapter(
    N: int, K: int, R: int, scaling: float = 0.5, dtype: torch.dtype = torch.float32
) -> Adapter:
    A = torch.randn(R, K) / math.sqrt(max(K, 1))
    B = torch.randn(N, R) * 0.1
    return Adapter(A.to(dtype), B.to(dtype), scaling)


def dropout_mask(M: int, K: int, p: float, seed: Tensor) -> Tensor:
    """The mask the kernels use, read from them: for x of ones and A rows of the identity,
    xa = drop(x) A^T is columns of the mask itself. float64 [M, K]."""
    weight = random_weight(1, K, K)
    columns = [
        torch.ops.hqqlora.lora_linear(
            torch.ones(M, K),
            *weight.packed[:3],
            None,
            A,
            torch.zeros(1, len(A)),
            seed,
            1.0,
            p,
            *weight.packed[3:],
        )[1]
        for A in torch.eye(K).split(256)  # the largest rank
    ]
    return torch.cat(columns, 1).double()
