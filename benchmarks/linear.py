"""Products with a frozen weight: forward, dgrad (dx = dy W), and both through autograd.

hqqlora against dense torch in the same dtype, and against hqq's own HQQLinear on the CPU, which
dequantizes the whole weight for each product.
"""

from __future__ import annotations

from functools import partial

import report
import torch
import torch.nn.functional as F
from layers import DTYPES, Layers
from timing import Contender, take_turns

import hqqlora.autograd

SIZES = ("4096x4096:bf16", "14336x4096:bf16", "4096x4096:fp32", "1536x576:bf16")
ROWS = (1, 16, 128, 512, 2048)
ops = torch.ops.hqqlora


def forward(layers: Layers, M: int) -> dict[str, Contender]:
    x = torch.randn(M, layers.K).to(layers.dtype)
    count = len(layers)
    contenders: dict[str, Contender] = {
        "hqqlora": lambda i: ops.linear(
            x, *layers.ours[i % count][:3], None, *layers.ours[i % count][3:]
        ),
        "dense": lambda i: F.linear(x, layers.dense[i % count]),
    }
    if layers.hqq:
        contenders["hqq"] = lambda i: layers.hqq[i % count](x)
    return contenders


def dgrad(layers: Layers, M: int) -> dict[str, Contender]:
    dy = torch.randn(M, layers.N).to(layers.dtype)
    count = len(layers)
    contenders: dict[str, Contender] = {
        "hqqlora": lambda i: ops.linear_dgrad(
            dy, *layers.ours[i % count][:3], *layers.ours[i % count][3:]
        ),
        "dense": lambda i: dy @ layers.dense[i % count],
    }
    if layers.hqq:
        contenders["hqq"] = lambda i: layers.hqq[i % count].matmul(dy, transpose=False)
    return contenders


def forward_and_backward(layers: Layers, M: int) -> dict[str, Contender]:
    x = torch.randn(M, layers.K).to(layers.dtype).requires_grad_()
    dy = torch.randn(M, layers.N).to(layers.dtype)
    count = len(layers)

    def both(product, weights, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = product(x, weights[i % count])
        y.backward(dy)
        dx, x.grad = x.grad, None
        return y.detach(), dx

    contenders: dict[str, Contender] = {
        "hqqlora": partial(both, hqqlora.autograd.linear, layers.ours),
        "dense": partial(both, F.linear, layers.dense),
    }
    if layers.hqq:
        contenders["hqq"] = partial(both, lambda x, layer: layer(x), layers.hqq)
    return contenders


PASSES = {
    "forward": (forward, 1),
    "dgrad": (dgrad, 1),
    "forward + backward": (forward_and_backward, 2),
}


def parse_size(text: str) -> tuple[int, int, torch.dtype]:
    """4096x4096:bf16"""
    size, _, dtype = text.partition(":")
    N, K = map(int, size.split("x"))
    return N, K, DTYPES[dtype]


def measure(
    sizes=SIZES, rows=ROWS, passes=tuple(PASSES), nbits=4, axis=1, group_size=64, seconds=1.0
) -> list[report.Row]:
    """All figures; prints a table a size."""
    results = []
    for size in sizes:
        layers = Layers(*parse_size(size), nbits, group_size, axis)
        bits = f"{nbits} bits, groups of {group_size}, axis {axis}"
        print(f"\n### {layers.name}, {bits} ({len(layers)} copies)\n")
        lines = []
        for name in passes:
            make, products = PASSES[name]
            for M in rows:
                times = take_turns(make(layers, M), seconds)
                peers = [peer for peer in ("dense", "hqq") if peer in times.rounds[0]]
                ratios = {peer: times.ratio(peer, "hqqlora") for peer in peers}
                gflops = 2 * products * M * layers.N * layers.K / times.median("hqqlora") / 1e9
                lines.append(
                    [name, str(M), report.milliseconds(times.median("hqqlora"))]
                    + [report.milliseconds(times.median(peer)) for peer in peers]
                    + [report.times_faster(ratios[peer]) for peer in peers]
                    + [f"{gflops:.0f}"]
                )
                results.append(
                    {"size": size, "M": M, "pass": name, "nbits": nbits, "axis": axis}
                    | {"group_size": group_size, "seconds": times.summary(), "ratio": ratios}
                )
        header = ["pass", "M", "hqqlora ms", *(f"{peer} ms" for peer in peers)]
        header += [f"vs {peer}" for peer in peers]
        report.table(lines, [*header, "GFLOP/s"])
    return results


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="NxK:dtype")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="M")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=tuple(PASSES))
    parser.add_argument("--nbits", type=int, default=4)
    parser.add_argument("--axis", type=int, default=1)
    parser.add_argument("--group-size", type=int, default=64)
    a = parser.parse_args()
    description = report.start(a)
    results = measure(
        a.sizes, a.rows, a.passes, a.nbits, a.axis, a.group_size, a.seconds or 1.0
    )
    report.finish(a.json, description, {"linear": results})


if __name__ == "__main__":
    main()
