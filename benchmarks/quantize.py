"""Quantizing a weight: each of hqqlora's solvers against hqq's quantizer on the CPU.

The error is that of the weight read back, relative to the weight (Frobenius norms). The weight
is heavy-tailed (Student's t, 5 degrees of freedom), as trained ones are.
"""

from __future__ import annotations

import report
import torch
from layers import DTYPES
from linear import parse_size
from timing import Contender, take_turns

import hqqlora.ops
import machine

FORMATS = ((4, 64, 1), (4, 64, 0), (3, 64, 1), (2, 16, 1))
SOLVERS = ("default", "reference", "minmax")


def heavy_tailed(N: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    weight = torch.distributions.StudentT(torch.tensor(5.0)).sample((N, K)) * 0.02
    return weight.to(dtype)


def relative_error(weight: torch.Tensor, parts, nbits: int, group_size: int, axis: int) -> float:
    read_back = torch.ops.hqqlora.dequantize(
        *parts, *weight.shape, nbits, group_size, axis, torch.float32
    )
    weight = weight.float()
    return ((read_back - weight).norm() / weight.norm()).item()


def measure(size="1024x4096", dtype="bf16", formats=FORMATS, seconds=2.0):
    """All figures; prints one table."""
    N, K, torch_dtype = parse_size(f"{size}:{dtype}")
    weight = heavy_tailed(N, K, torch_dtype)
    lines, results = [], []
    for nbits, group_size, axis in formats:
        latest: dict[str, tuple[torch.Tensor, ...]] = {}

        def ours(name: str) -> Contender:
            solver = hqqlora.ops.Solver[name.upper()]

            def run(i: int) -> None:
                latest[name] = torch.ops.hqqlora.quantize(
                    weight, nbits, group_size, axis, torch.float32, solver,
                    round_zero=nbits == 4 and name == "reference",
                )  # fmt: skip

            return run

        def theirs(i: int) -> None:
            from hqq.core.quantize import Quantizer

            W_q, meta = Quantizer.quantize(
                weight, nbits=nbits, group_size=group_size, axis=axis, round_zero=nbits == 4,
                device="cpu",
            )  # fmt: skip
            latest["hqq"] = W_q, meta["scale"], meta["zero"]

        contenders = {name: ours(name) for name in SOLVERS}
        if machine.peer_version():
            contenders["hqq"] = theirs
        times = take_turns(contenders, seconds, at_least=2)
        ratios = {name: times.ratio("hqq", name) for name in SOLVERS if "hqq" in contenders}
        errors = {}
        for name in contenders:
            errors[name] = relative_error(weight, latest[name], nbits, group_size, axis)
            lines.append(
                [f"{nbits} bits, groups of {group_size}, axis {axis}", name]
                + [report.milliseconds(times.median(name))]
                + [f"{N * K / times.median(name) / 1e6:.1f}"]
                + [report.times_faster(ratios[name]) if name in ratios else ""]
                + [f"{errors[name]:.5f}"]
            )
        results.append(
            {"size": size, "dtype": dtype, "nbits": nbits, "axis": axis}
            | {"group_size": group_size, "seconds": times.summary()}
            | {"ratio": ratios, "relative_error": errors}
        )
    print(f"\n### Quantize, {size} {dtype}\n")
    report.table(
        lines, ["format", "solver", "ms", "M weights/s", "vs hqq", "relative error"]
    )
    return results


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument("--size", default="1024x4096", metavar="NxK")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    a = parser.parse_args()
    description = report.start(a)
    results = measure(a.size, a.dtype, FORMATS, a.seconds or 2.0)
    report.finish(a.json, description, {"quantize": results})


if __name__ == "__main__":
    main()
