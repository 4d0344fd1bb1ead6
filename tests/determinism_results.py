"""What the ops of this process compute from fixed inputs; as a program, into a file:

HQQLORA_ISA=portable python tests/determinism_results.py results.pt
"""

from __future__ import annotations

import itertools
import sys

import torch
from oracle import FLOATING, random_weight
from product import RESULTS, Product, random_product
from torch import Tensor

from hqqlora.ops import Solver

N, K, G, R = 192, 320, 64, 8
# few rows and many: other kernels
ROWS = (4, 40)


def products(rows: tuple[int, ...] = ROWS) -> dict[str, Product]:
    """By a name; every dtype, number of rows, number of bits and axis."""
    torch.manual_seed(20)
    found = {}
    bits = itertools.cycle((8, 4, 3, 2, 1))
    for dtype, M, axis in itertools.product(FLOATING, rows, (0, 1)):
        nbits = next(bits)
        weight = random_weight(N, K, G, nbits, axis, dtype)
        name = f"{dtype} M={M} axis={axis} nbits={nbits}"
        found[name] = random_product(weight, M, R, dtype, torch.float32, 0.25, 7 + M)
    return found


def of_products(ops, rows: tuple[int, ...] = ROWS) -> dict[str, Tensor]:
    return {
        f"{name}: {result}": value
        for name, product in products(rows).items()
        for result, value in zip(RESULTS, product.results(ops), strict=True)
    }


def of_formats(ops) -> dict[str, Tensor]:
    """Codes, scales, zeros and dequantized weights of all solvers, and dropout's mask."""
    torch.manual_seed(21)
    found = {}
    W = torch.randn(N, K) * 0.05
    for solver, nbits, axis in itertools.product(Solver, (8, 4, 3, 2, 1), (0, 1)):
        dtype = FLOATING[(nbits + axis) % 3]
        arguments = (nbits, G, axis, dtype)
        parts = ops.quantize(W.to(FLOATING[nbits % 3]), *arguments, int(solver))
        name = f"{solver.name} nbits={nbits} axis={axis}"
        found |= {
            f"{name}: {part}": value
            for part, value in zip(("W_q", "scale", "zero"), parts, strict=True)
        }
        for out in FLOATING:
            found[f"{name}: {out}"] = ops.dequantize(*parts, N, K, nbits, G, axis, out)
    weight = random_weight(8, 64, 64)
    _, found["mask"] = ops.lora_linear(
        torch.ones(40, 64), *weight.packed[:3], None, torch.eye(64), torch.zeros(8, 64),
        torch.tensor([5]), 1.0, 0.3, *weight.packed[3:],
    )  # fmt: skip
    return found


def of_shared_inputs_and_experts() -> dict[str, Tensor]:
    """The ops that models with such layers use."""
    ops = torch.ops.hqqlora
    p = next(p for name, p in products().items() if "bfloat16 M=40 axis=1" in name)
    A, B = p.adapter.A, p.adapter.B
    xa = ops.lora_project(p.x, A)
    dyb, dB = ops.lora_factor_gradients(p.dy, xa, B, 0.7, True, True)
    dx, dA = ops.lora_input_gradients(p.dy, dyb, p.x, *p.packed, A, 0.7, *p.numbers, True, True)
    y = ops.lora_linear_from_xa(p.x, *p.packed, None, xa, B, 0.7, *p.numbers)
    found = {"xa": xa, "dyb": dyb, "dB": dB, "dx": dx, "dA": dA, "y": y}
    experts = (*(torch.stack([t, t.flip(0)]) for t in p.packed), torch.tensor([0, 3, 40]))
    factors = (torch.stack([A, -A]), torch.stack([B, B]), p.seed, 0.7, 0.25)
    found["experts' y"] = ops.grouped_linear(p.x, *experts, *p.numbers)
    found["experts' dx"] = ops.grouped_linear_dgrad(p.dy, *experts, *p.numbers)
    y, xa = ops.grouped_lora_linear(p.x, *experts, *factors, *p.numbers)
    gradients = ops.grouped_lora_linear_backward(
        p.dy, p.x, xa, *experts, *factors, *p.numbers, True, True, True
    )
    for name, value in zip(("y", "xa", "dx", "dA", "dB"), (y, xa, *gradients), strict=True):
        found[f"experts' {name} with LoRA"] = value
    return found


def everything() -> dict[str, Tensor]:
    ops = torch.ops.hqqlora
    return of_formats(ops) | of_products(ops) | of_shared_inputs_and_experts()


if __name__ == "__main__":
    torch.save(everything(), sys.argv[1])
