"""What must work under any torch from 2.10 on: run by second_torch.sh in each environment.

Every op against float64, gradients, opcheck and torch.compile; no test framework. On the CPU
and, where there is a GPU and the package has kernels for it, there too. Prints which torch ran,
and the SHA-256 of the native libraries that came with the package.
"""

import hashlib
import math
import sys
from pathlib import Path

import torch

import hqqlora.autograd
import hqqlora.ops

N, K, R, M, G = 48, 128, 4, 7, 32
SCALING = 0.5
EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
ops = torch.ops.hqqlora


def close(ours: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> None:
    """Within rounding of the result and of sums of `magnitude` in float32."""
    bound = EPSILON[ours.dtype] * exact.abs() + 64 * 2.0**-23 * magnitude
    if ours.dtype != torch.float32:  # 16-bit products may round their inputs once
        bound = bound + 4 * EPSILON[ours.dtype] * magnitude / math.sqrt(K)
    error = (ours.double() - exact).abs()
    assert torch.isfinite(ours).all()
    assert (error <= bound).all(), (error / bound).max()


def quantized(nbits: int, axis: int, dtype: torch.dtype) -> hqqlora.ops.PackedWeight:
    parts = ops.quantize(torch.randn(N, K) * 0.1, nbits, G, axis, dtype)
    return hqqlora.ops.PackedWeight(*parts, N, K, nbits, G, axis)


def check_products(nbits: int, axis: int, dtype: torch.dtype) -> None:
    """Forward and gradients of the adapter's product, against float64 autograd."""
    weight = quantized(nbits, axis, dtype)
    W = ops.dequantize(*weight, torch.float32).double()
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    A, B = torch.randn(R, K) * 0.1, torch.randn(N, R) * 0.1
    close(
        ops.linear(x, *weight[:3], None, *weight[3:]),
        x.double() @ W.T,
        x.double().abs() @ W.T.abs(),
    )
    close(
        ops.linear_dgrad(dy, *weight[:3], *weight[3:]),
        dy.double() @ W,
        dy.double().abs() @ W.abs(),
    )

    inputs = [x, A, B]
    ours = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    y = hqqlora.autograd.lora_linear(ours[0], weight, None, *ours[1:], SCALING)
    y64 = exact[0] @ W.T + SCALING * (exact[0] @ exact[1].T) @ exact[2].T
    gradients = torch.autograd.grad(y, ours, dy)
    gradients64 = torch.autograd.grad(y64, exact, dy.double())
    sizes = [t.double().abs() for t in (x, A, B, dy)]
    ax, aA, aB, ady = sizes
    close(y.detach(), y64.detach(), ax @ W.T.abs() + SCALING * (ax @ aA.T) @ aB.T)
    magnitudes = [ady @ W.abs() + (ady @ aB) @ aA, (ady @ aB).T @ ax, ady.T @ (ax @ aA.T)]
    for ours_, exact_, magnitude in zip(gradients, gradients64, magnitudes, strict=True):
        close(ours_, exact_, magnitude)


def check_registration() -> None:
    """torch's own checks of schemas and fakes."""
    weight = quantized(4, 1, torch.float32)
    x, dy = torch.randn(M, K), torch.randn(M, N)
    seed = torch.tensor([3])
    adapter = (torch.randn(R, K), torch.randn(N, R), seed, SCALING, 0.1)
    _, xa = ops.lora_linear(x, *weight[:3], None, *adapter, *weight[3:])
    for op, arguments in {
        ops.quantize: (torch.randn(N, K), 4, G, 1, torch.float16),
        ops.dequantize: (*weight, torch.bfloat16),
        ops.linear: (x, *weight[:3], torch.randn(N), *weight[3:]),
        ops.linear_dgrad: (dy, *weight[:3], *weight[3:]),
        ops.lora_linear: (x, *weight[:3], None, *adapter, *weight[3:]),
        ops.lora_linear_backward: (
            dy, x, xa, *weight[:3], *adapter, *weight[3:], True, True, True
        ),
    }.items():  # fmt: skip
        torch.library.opcheck(op.default, arguments)


def check_compile() -> None:
    """One graph, forward and backward, with the same numbers."""
    weight = quantized(4, 1, torch.float32)
    A, B = torch.randn(R, K, requires_grad=True), torch.randn(N, R, requires_grad=True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        y = hqqlora.autograd.lora_linear(x, weight, None, A, B, SCALING)
        return torch.nn.functional.silu(y).square().mean()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for rows in (M, 2 * M):  # the second size becomes a symbol
        x = torch.randn(rows, K, requires_grad=True)
        results = [
            (value, *torch.autograd.grad(value, (x, A, B))) for value in (loss(x), compiled(x))
        ]
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)


def refusal(x: torch.Tensor) -> str:
    weight = quantized(4, 1, torch.float32)
    try:
        ops.linear(x, *weight[:3], None, *weight[3:])
    except RuntimeError as error:
        return str(error)
    return "accepted"


def check_errors() -> None:
    """A wrong shape is an exception with the values in it."""
    message = refusal(torch.randn(M, K + 1))
    assert f"in_features = {K}, got shape [{M}, {K + 1}]" in message, message


def check_everything() -> None:
    torch.manual_seed(0)
    for nbits, axis, dtype in (
        (4, 1, torch.float32), (4, 0, torch.bfloat16), (3, 1, torch.float16),
        (8, 0, torch.float32), (2, 1, torch.bfloat16), (1, 1, torch.float32),
    ):  # fmt: skip
        check_products(nbits, axis, dtype)
    check_registration()
    check_compile()
    check_errors()


def main() -> None:
    places = ["cpu"]
    if torch.cuda.is_available() and ops.refused_cuda is None:
        places.append("cuda")
    for place in places:
        with torch.device(place):
            check_everything()
    print(
        f"torch {torch.__version__}, Python {sys.version.split()[0]}: all checks hold on "
        f"{' and '.join(places)}"
    )
    libraries = [
        path
        for folder in hqqlora.__path__
        for path in Path(folder).glob("*.so")
        if path.name.startswith(("hqqlora_torch", "libhqqlora"))
    ]
    assert len(libraries) in (2, 4), libraries
    for path in sorted(libraries, key=lambda path: path.name):
        print(hashlib.sha256(path.read_bytes()).hexdigest(), path.name)


if __name__ == "__main__":
    main()
