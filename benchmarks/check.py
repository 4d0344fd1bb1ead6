"""Whether the contenders of the benchmarks compute the same. Nothing is timed.

    python benchmarks/check.py

Each contender runs once on a small weight, in all formats: hqqlora, dense torch on the weight
read back, and hqq's own layer around the same words. Each result is compared, element by
element, with float64 products of the weight as hqq unpacks it. A ratio of times says nothing
where the work was not the same.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import dequantize
import linear
import lora
import quantize
import report
import torch
from layers import DTYPE_NAMES, Layers
from timing import Contender
from torch import Tensor

from hqqlora.ops.weight import SLOTS_PER_WORD
from hqqlora.optional_packages import absence

N, K, G, R = 192, 320, 64, 8
ROWS = (1, 20, 150)  # few, medium and many tokens have kernels of their own
FORMATS = [(nbits, axis) for nbits in SLOTS_PER_WORD for axis in (1, 0)]
DTYPES = (torch.float32, torch.bfloat16)
# Roundings to the dtype on the longest way of any contender: W read back (zero, difference,
# product with the scale), a product, PEFT's product with the scaling, its sum.
ROUNDINGS = 6
# The solver with hqq's formula may choose another of two codes that are equally near, no more.
SAME_SOLVER = 1e-3


@dataclass
class Exact:
    """A float64 matrix, and the sums of magnitudes that errors in it are measured against."""

    value: Tensor
    magnitude: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Exact:
        value = tensor.detach().double()
        return cls(value, value.abs())

    @property
    def T(self) -> Exact:  # noqa: N802 (as torch has it)
        return Exact(self.value.T, self.magnitude.T)

    def __matmul__(self, other: Exact) -> Exact:
        return Exact(self.value @ other.value, self.magnitude @ other.magnitude)

    def __add__(self, other: Exact) -> Exact:
        return Exact(self.value + other.value, self.magnitude + other.magnitude)

    def __mul__(self, factor: float) -> Exact:
        return Exact(self.value * factor, self.magnitude * abs(factor))

    def error(self, got: Tensor, dtype: torch.dtype, length: int) -> float:
        """The largest error as a share of what roundings to the dtype and fp32 sums of `length`
        may bring; infinity where something is not finite."""
        assert got.shape == self.value.shape, (got.shape, self.value.shape)
        unit = ROUNDINGS * torch.finfo(dtype).eps + length * torch.finfo(torch.float32).eps
        allowed = unit / 2 * self.magnitude + torch.finfo(dtype).smallest_normal
        share = ((got.double() - self.value).abs() / allowed).max().item()
        return math.inf if math.isnan(share) else share


class Line(NamedTuple):
    """The contenders of one line of a benchmark, and what each must return."""

    name: str
    contenders: dict[str, Contender]
    expected: tuple[Exact, ...]
    length: int


def read_back(layer: Any) -> Exact:
    """The weight of hqq's layer: (q - zero) scale, and (q + |zero|) |scale|."""
    from hqq.core.quantize import Quantizer

    def dequantize(zero: Tensor, scale: Tensor) -> Tensor:
        meta = layer.meta | {"zero": zero, "scale": scale, "compute_dtype": torch.float64}
        W: Tensor = Quantizer.dequantize(layer.W_q, meta)
        return W

    zero, scale = layer.meta["zero"].double(), layer.meta["scale"].double()
    return Exact(dequantize(zero, scale), dequantize(-zero.abs(), scale.abs()))


def drawn(M: int, dtype: torch.dtype, *lengths: int) -> list[Exact]:
    """The [M, length] inputs that a benchmark draws next, seen before it does."""
    torch.manual_seed(M)
    inputs = [Exact.of(torch.randn(M, length).to(dtype)) for length in lengths]
    torch.manual_seed(M)
    return inputs


def products(layers: Layers, W: Exact) -> Iterator[Line]:
    for M in ROWS:
        for name, (make, _) in linear.PASSES.items():
            x, dy = drawn(M, layers.dtype, K, N)
            expected: tuple[Exact, ...] = (x @ W.T, dy @ W)
            if name == "forward":
                expected = expected[:1]
            elif name == "dgrad":
                (dy,) = drawn(M, layers.dtype, N)
                expected = (dy @ W,)
            yield Line(f"{name}, M = {M}", make(layers, M), expected, max(N, K))


def reading_back(layers: Layers, W: Exact) -> Iterator[Line]:
    yield Line("dequantize", dequantize.contenders_of(layers), (W,), 0)


def adapted(layers: Layers, W: Exact) -> Iterator[Line]:
    adapter = lora.Adapter(layers, R, 0.0)
    A, B = Exact.of(adapter.A), Exact.of(adapter.B)
    for M in ROWS:
        x, dy = drawn(M, layers.dtype, K, N)
        y = x @ W.T + x @ A.T @ B.T * lora.SCALING
        dx = dy @ W + dy @ B @ A * lora.SCALING
        dA, dB = (dy @ B).T @ x * lora.SCALING, dy.T @ (x @ A.T) * lora.SCALING
        contenders = lora.contenders_of(layers, adapter, M)
        yield Line(f"LoRA, M = {M}", contenders, (y, dx, dA, dB), N + K + M)


def lines(layers: Layers) -> Iterator[Line]:
    """Of all benchmarks that multiply or read back."""
    W = read_back(layers.hqq[0])
    yield from products(layers, W)
    yield from reading_back(layers, W)
    yield from adapted(layers, W)


def errors(line: Line, dtype: torch.dtype) -> dict[str, float]:
    """The largest error of each contender."""
    found = {}
    for name, contender in line.contenders.items():
        results = contender(0)
        results = results if isinstance(results, tuple) else (results,)
        pairs = zip(results, line.expected, strict=True)
        found[name] = max(exact.error(got, dtype, line.length) for got, exact in pairs)
    return found


def check_products() -> list[str]:
    """Prints the largest error of each contender by format; returns what differs."""
    differs, table = [], []
    names = ("hqqlora", "dense", "hqq", "copy")
    for dtype in DTYPES:
        for nbits, axis in FORMATS:
            torch.manual_seed(nbits)
            layers = Layers(N, K, dtype, nbits, G, axis, copies=2, same_numbers=True)
            label = f"{nbits} bits, axis {axis}, {DTYPE_NAMES[dtype]}"
            found = [(line.name, errors(line, dtype)) for line in lines(layers)]
            largest = [max(of.get(name, 0.0) for _, of in found) for name in names]
            table.append([label, *(f"{error:.3f}" for error in largest)])
            differs += [
                f"{name}, {label}, {line}: {error:.3g} times the bound"
                for line, of in found
                for name, error in of.items()
                if error > 1
            ]
    print("\n### Products, largest error / bound\n")
    report.table(table, ["format", *names])
    return differs


def check_quantizers() -> list[str]:
    """Prints the solvers' errors beside hqq's; returns where reference is another than hqq's,
    or default a worse one."""
    differs, table = [], []
    torch.manual_seed(0)
    weight = quantize.heavy_tailed(N, K, torch.bfloat16)
    for f in quantize.FORMATS:
        parts = {solver: quantize.ours(weight, f, solver) for solver in quantize.SOLVERS}
        parts["hqq"] = quantize.theirs(weight, f)
        error = {name: quantize.relative_error(weight, p, f) for name, p in parts.items()}
        table.append([str(f), *(f"{error[name]:.6f}" for name in parts)])
        if abs(error["reference"] - error["hqq"]) > SAME_SOLVER * error["hqq"]:
            differs.append(f"reference, {f}: error {error['reference']}, hqq's {error['hqq']}")
        if not error["default"] <= error["hqq"]:
            differs.append(f"default, {f}: error {error['default']}, hqq's {error['hqq']}")
    print("\n### Quantizers, relative error\n")
    report.table(table, ["format", *parts])
    return differs


def main() -> int:
    arguments = report.options(__doc__).parse_args()
    description = report.start(arguments)
    if description["hqq"] is None:
        sys.exit(f"check.py compares with hqq: {absence('hqq')}")
    differs = check_products() + check_quantizers()
    if differs:
        print(f"\n### Different results ({len(differs)})\n")
        print("\n".join(f"- {line}" for line in differs))
        return 1
    print("\nAll contenders compute the same.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
