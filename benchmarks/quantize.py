"""Quantizing a weight: each of hqqlora's solvers against hqq's quantizer on the CPU.

The error is that of the weight read back, relative to the weight (Frobenius norms). The weight
is heavy-tailed (Student's t, 5 degrees of freedom), as trained ones are.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import machine
import report
import torch
from layers import DTYPES
from linear import parse_size
from timing import Contender, take_turns

import hqqlora.ops


class Format(NamedTuple):
    nbits: int
    group_size: int
    axis: int

    def __str__(self) -> str:
        return f"{self.nbits} bits, groups of {self.group_size}, axis {self.axis}"


def parse_format(text: str) -> Format:
    """4 bits, groups of 64, axis 1 of "4,64,1"."""
    return Format(*map(int, text.split(",")))


FORMATS = (Format(4, 64, 1), Format(4, 64, 0), Format(3, 64, 1), Format(2, 16, 1))
SOLVERS = ("default", "reference", "minmax")
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def heavy_tailed(N: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    weight = torch.distributions.StudentT(torch.tensor(5.0)).sample((N, K)) * 0.02
    return weight.to(dtype)


def ours(weight: torch.Tensor, f: Format, solver: str) -> Parts:
    return torch.ops.hqqlora.quantize(
        weight,
        *f,
        torch.float32,
        hqqlora.ops.Solver[solver.upper()],
        round_zero=f.nbits == 4 and solver == "reference",
    )


def theirs(weight: torch.Tensor, f: Format) -> Parts:
    from hqq.core.quantize import Quantizer

    W_q, meta = Quantizer.quantize(weight, **f._asdict(), round_zero=f.nbits == 4, device="cpu")
    return W_q, meta["scale"], meta["zero"]


def relative_error(weight: torch.Tensor, parts: Parts, f: Format) -> float:
    read_back = torch.ops.hqqlora.dequantize(*parts, *weight.shape, *f, torch.float32)
    weight = weight.float()
    return ((read_back - weight).norm() / weight.norm()).item()


def measure(size="512x4096", dtype="bf16", formats=FORMATS, seconds=2.0):
    """All figures; prints one table."""
    weight = heavy_tailed(*parse_size(f"{size}:{dtype}"))
    lines, results = [], []
    for f in formats:
        quantizers = {solver: partial(ours, weight, f, solver) for solver in SOLVERS}
        if machine.peer_version():
            quantizers["hqq"] = partial(theirs, weight, f)
        errors = {name: relative_error(weight, q(), f) for name, q in quantizers.items()}
        contenders: dict[str, Contender] = {
            name: lambda i, q=q: q() for name, q in quantizers.items()
        }
        times = take_turns(contenders, seconds, at_least=2)
        ratios = {name: times.ratio("hqq", name) for name in SOLVERS if "hqq" in contenders}
        for name in contenders:
            rate = weight.numel() / times.median(name) / 1e6
            ratio = report.times_faster(ratios[name]) if name in ratios else ""
            time = report.milliseconds(times.median(name))
            lines.append([str(f), name, time, f"{rate:.1f}", ratio, f"{errors[name]:.5f}"])
        results.append(
            {"size": size, "dtype": dtype, **f._asdict(), "seconds": times.summary()}
            | {"ratio": ratios, "relative_error": errors}
        )
    print(f"\n### Quantize, {size} {dtype}\n")
    report.table(lines, ["format", "solver", "ms", "M weights/s", "vs hqq", "relative error"])
    return results


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument("--size", default="512x4096", metavar="NxK")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--format",
        type=parse_format,
        action="append",
        metavar="BITS,G,AXIS",
        help="one of those to measure (default: four)",
    )
    a = parser.parse_args()
    description = report.start(a)
    results = measure(a.size, a.dtype, a.format or FORMATS, a.seconds or 2.0)
    report.finish(a.json, description, {"quantize": results})


if __name__ == "__main__":
    main()
