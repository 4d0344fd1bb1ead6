"""The whole weight back to bf16 or fp32: hqqlora against hqq, and against copying the result.

A copy of a dense weight of the same size is the floor: it writes as much, and reads more.
"""

from __future__ import annotations

import report
import torch
from layers import DTYPES, Layers
from linear import parse_size
from timing import Contender, take_turns

FORMATS = ((8, 1), (4, 1), (3, 1), (2, 1), (1, 1), (4, 0), (2, 0))


def contenders_of(layers: Layers) -> dict[str, Contender]:
    count = len(layers)

    def ours(i: int) -> torch.Tensor:
        weight = layers.ours[i % count]
        return torch.ops.hqqlora.dequantize(*weight, layers.dtype)

    contenders: dict[str, Contender] = {
        "hqqlora": ours,
        "copy": lambda i: layers.dense[i % count].clone(),
    }
    if layers.hqq:
        contenders["hqq"] = lambda i: layers.hqq[i % count].dequantize()
    return contenders


def measure(
    size="4096x4096", dtypes=("bf16", "fp32"), formats=FORMATS, group_size=64, seconds=1.0
):
    """All figures; prints one table."""
    lines, results = [], []
    for dtype in dtypes:
        # hqq's other formats are as slow in fp32: one stands for all
        for nbits, axis in formats if dtype == dtypes[0] else formats[1:2]:
            layers = Layers(*parse_size(f"{size}:{dtype}"), nbits, group_size, axis)
            times = take_turns(contenders_of(layers), seconds)
            peers = [peer for peer in ("copy", "hqq") if peer in times.rounds[0]]
            ratios = {peer: times.ratio(peer, "hqqlora") for peer in peers}
            rate = layers.N * layers.K / times.median("hqqlora") / 1e9
            lines.append(
                [f"{nbits} bits, axis {axis}, to {dtype}"]
                + [report.milliseconds(times.median("hqqlora")), f"{rate:.1f}"]
                + [report.milliseconds(times.median(peer)) for peer in peers]
                + [report.times_faster(ratios[peer]) for peer in peers]
            )
            results.append(
                {"size": size, "dtype": dtype, "nbits": nbits, "axis": axis}
                | {"group_size": group_size, "seconds": times.summary(), "ratio": ratios}
            )
    print(f"\n### Dequantize, {size}, groups of {group_size} ({len(layers)} copies or more)\n")
    header = ["format", "hqqlora ms", "G weights/s", *(f"{peer} ms" for peer in peers)]
    report.table(lines, [*header, *(f"vs {peer}" for peer in peers)])
    return results


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument("--size", default="4096x4096", metavar="NxK")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=("bf16", "fp32"))
    parser.add_argument("--group-size", type=int, default=64)
    a = parser.parse_args()
    description = report.start(a)
    results = measure(a.size, a.dtypes, FORMATS, a.group_size, a.seconds or 1.0)
    report.finish(a.json, description, {"dequantize": results})


if __name__ == "__main__":
    main()
