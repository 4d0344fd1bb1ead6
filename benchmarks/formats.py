"""Products by format: each bit width and axis against 4 bits, axis 1, on the same shape.

Formats take turns; a ratio below 1 is slower than 4 bits, axis 1. Weights are packed as layers
hold them: 3 bits in planes.
"""

from __future__ import annotations

import linear
import report
from layers import DTYPE_NAMES, Layers
from timing import Contender, take_turns

FORMATS = ((4, 1), (4, 0), (8, 1), (8, 0), (3, 1), (3, 0), (2, 1), (2, 0), (1, 1), (1, 0))
BASE = FORMATS[0]
ROWS = (1, 16, 128, 512)
PASSES = ("forward", "dgrad")


def in_words(nbits: int, axis: int) -> str:
    return f"{nbits} bits, axis {axis}"


def measure(
    size="4096x4096:bf16", rows=ROWS, passes=PASSES, group_size=64, seconds=1.5
) -> list[report.Row]:
    """All figures; prints one table."""
    weights = {
        in_words(nbits, axis): Layers(*linear.parse_size(size), nbits, group_size, axis)
        for nbits, axis in FORMATS
    }
    base = in_words(*BASE)
    cells: dict[str, list[str]] = {name: [] for name in weights}
    results, milliseconds = [], []
    for pass_name in passes:
        make, _ = linear.PASSES[pass_name]
        for M in rows:
            contenders: dict[str, Contender] = {
                name: make(layers, M)["hqqlora"] for name, layers in weights.items()
            }
            times = take_turns(contenders, seconds)
            ratios = {name: times.ratio(base, name) for name in weights}
            milliseconds.append(report.milliseconds(times.median(base)))
            for name, ratio in ratios.items():
                cells[name].append(f"{ratio:.2f}")
            results.append(
                {"size": size, "M": M, "pass": pass_name, "group_size": group_size}
                | {"seconds": times.summary(), "ratio": ratios}
            )
    N, K, dtype = linear.parse_size(size)
    print(f"\n### Formats, {N} x {K} {DTYPE_NAMES[dtype]}, speed relative to {base}\n")
    lines = [[f"{base}, ms", *milliseconds], *([name, *cells[name]] for name in weights)]
    report.table(lines, ["format", *(f"{name}, M = {M}" for name in passes for M in rows)])
    return results


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument("--size", default="4096x4096:bf16", metavar="NxK:dtype")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="M")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--group-size", type=int, default=64)
    a = parser.parse_args()
    description = report.start(a)
    results = measure(a.size, a.rows, a.passes, a.group_size, a.seconds or 1.5)
    report.finish(a.json, description, {"formats": results})


if __name__ == "__main__":
    main()
