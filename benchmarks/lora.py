"""One LoRA layer, forward and backward (dx, dA, dB): fused, against PEFT's separate ops.

    hqqlora   hqqlora.autograd.lora_linear on the quantized weight
    dense     F.linear(x, W) + lora_B(lora_A(dropout(x.to(A.dtype)))) * scaling, as PEFT does
    hqq       the same around hqq's own HQQLinear

A and B are fp32, as PEFT keeps them.
"""

from __future__ import annotations

from collections.abc import Callable

import report
import torch
import torch.nn.functional as F
from layers import Layers
from linear import parse_size
from timing import Contender, take_turns

import hqqlora.autograd

SIZES = ("4096x4096:bf16", "4096x4096:fp32", "1536x576:bf16")
ROWS = (16, 512, 2048)
SCALING = 2.0


class Adapter:
    """A and B with their gradients."""

    def __init__(self, layers: Layers, rank: int, dropout: float) -> None:
        self.A = (torch.randn(rank, layers.K) / layers.K**0.5).requires_grad_()
        self.B = (torch.randn(layers.N, rank) * 0.01).requires_grad_()
        self.dropout = dropout

    def apart(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y plus the adapter's part, op by op as in peft.tuners.lora.layer.Linear.forward."""
        low = F.linear(F.dropout(x.to(self.A.dtype), self.dropout), self.A)
        return (y + F.linear(low, self.B) * SCALING).to(y.dtype)


def contenders_of(layers: Layers, adapter: Adapter, M: int) -> dict[str, Contender]:
    x = torch.randn(M, layers.K).to(layers.dtype).requires_grad_()
    dy = torch.randn(M, layers.N).to(layers.dtype)
    count = len(layers)

    def training_step(forward: Callable[[int], torch.Tensor]) -> Contender:
        def run(i: int) -> tuple[torch.Tensor, ...]:
            y = forward(i % count)
            y.backward(dy)
            results = y.detach(), x.grad, adapter.A.grad, adapter.B.grad
            x.grad = adapter.A.grad = adapter.B.grad = None
            return results

        return run

    contenders = {
        "hqqlora": training_step(
            lambda i: hqqlora.autograd.lora_linear(
                x, layers.ours[i], None, adapter.A, adapter.B, SCALING, adapter.dropout
            )
        ),
        "dense": training_step(lambda i: adapter.apart(x, F.linear(x, layers.dense[i]))),
    }
    if layers.hqq:
        contenders["hqq"] = training_step(lambda i: adapter.apart(x, layers.hqq[i](x)))
    return contenders


def measure(sizes=SIZES, rows=ROWS, rank=16, dropouts=(0.0, 0.1), seconds=1.0):
    """All figures; prints one table."""
    lines, results = [], []
    for size in sizes:
        layers = Layers(*parse_size(size))
        for dropout in dropouts:
            adapter = Adapter(layers, rank, dropout)
            # one row count stands for all in the table of dropout
            for M in rows if dropout == dropouts[0] else rows[1:2]:
                times = take_turns(contenders_of(layers, adapter, M), seconds)
                peers = [peer for peer in ("dense", "hqq") if peer in times.rounds[0]]
                ratios = {peer: times.ratio(peer, "hqqlora") for peer in peers}
                lines.append(
                    [layers.name, str(M), f"{dropout:g}"]
                    + [report.milliseconds(times.median("hqqlora"))]
                    + [report.milliseconds(times.median(peer)) for peer in peers]
                    + [report.times_faster(ratios[peer]) for peer in peers]
                )
                results.append(
                    {"size": size, "M": M, "rank": rank, "dropout": dropout}
                    | {"seconds": times.summary(), "ratio": ratios}
                )
    print(f"\n### LoRA of rank {rank} (fp32) on 4 bits, forward + backward\n")
    header = ["weight", "M", "dropout", "hqqlora ms", *(f"{peer} ms" for peer in peers)]
    report.table(lines, [*header, *(f"vs {peer}" for peer in peers)])
    return results


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="NxK:dtype")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="M")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", nargs="+", type=float, default=(0.0, 0.1))
    a = parser.parse_args()
    description = report.start(a)
    results = measure(a.sizes, a.rows, a.rank, a.dropout, a.seconds or 1.0)
    report.finish(a.json, description, {"lora": results})


if __name__ == "__main__":
    main()
