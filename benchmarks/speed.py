"""Speed over the number of tokens M, as a table and as a picture.

One weight, forward and dgrad, fp32, fp16 and bf16, against dense torch and hqq. The picture
shows where the library goes from one kernel to the next (c_api/choose_kernel.c): a step there
is a threshold that is not right for this machine (benchmarks/tune.py).

    python benchmarks/speed.py --plot speed.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kernel_choice
import linear
import report
from layers import Layers
from timing import take_turns

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
PASSES = ("forward", "dgrad")
DTYPES = ("fp32", "fp16", "bf16")
CONTENDERS = ("hqqlora", "dense", "hqq")


def measure(size="4096x4096", dtypes=DTYPES, rows=ROWS, seconds=0.5) -> list[report.Row]:
    """All figures; prints one table."""
    lines, results = [], []
    for dtype in dtypes:
        layers = Layers(*linear.parse_size(f"{size}:{dtype}"))
        for name in PASSES:
            switches = kernel_choice.switches(dtype, name, max(rows))
            for M in rows:
                times = take_turns(linear.PASSES[name][0](layers, M), seconds)
                flops = 2 * M * layers.N * layers.K
                medians = {c: times.median(c) for c in CONTENDERS if c in times.rounds[0]}
                rates = {c: flops / median / 1e9 for c, median in medians.items()}
                kernel = kernel_choice.chosen(M, dtype, name)
                lines.append(
                    [f"{name} {dtype}", str(M), kernel]
                    + [f"{rates[c]:.3g}" if c in rates else "" for c in CONTENDERS]
                )
                results.append(
                    {"size": size, "dtype": dtype, "pass": name, "M": M, "kernel": kernel}
                    | {"switches": switches, "seconds": times.summary(), "gflops": rates}
                )
    print(f"\n### GFLOP/s over M, {size}, 4 bits, groups of 64, axis 1\n")
    report.table(lines, ["pass", "M", "kernel", *CONTENDERS])
    return results


def plot(path: Path, results: list[report.Row], title: str) -> None:
    """One panel a pass and dtype; both axes are logarithmic. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(row["dtype"] for row in results))
    figure, panels = pyplot.subplots(
        len(PASSES), len(dtypes), figsize=(4.2 * len(dtypes), 7), sharex=True, squeeze=False
    )
    for i, name in enumerate(PASSES):
        for panel, dtype in zip(panels[i], dtypes, strict=True):
            rows = [row for row in results if (row["pass"], row["dtype"]) == (name, dtype)]
            draw(panel, rows, f"{name}, {dtype}")
    for panel in panels[-1]:
        panel.set_xlabel("tokens M")
    for line in panels:
        line[0].set_ylabel("GFLOP/s")
    panels[0][0].legend(loc="lower right")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw(panel: Any, rows: list[report.Row], title: str) -> None:
    """The contenders' lines, and the kernels' stretches between them."""
    tokens = [row["M"] for row in rows]
    for name in CONTENDERS:
        if all(name in row["gflops"] for row in rows):
            panel.loglog(tokens, [row["gflops"][name] for row in rows], "o-", ms=3, label=name)
    for start, kernel in rows[0]["switches"]:
        if start > 1:
            panel.axvline(start - 0.5, color="grey", linewidth=0.8, linestyle=":")
        panel.text(start, 1.01, f" {kernel}", transform=panel.get_xaxis_transform(), fontsize=7)
    panel.set_title(title, fontsize=9, pad=14)
    panel.set_xticks(tokens, [str(M) for M in tokens], fontsize=7, rotation=60)
    panel.minorticks_off()


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument("--size", default="4096x4096", metavar="NxK")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="M")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the picture there")
    a = parser.parse_args()
    description = report.start(a)
    results = measure(a.size, a.dtypes, tuple(sorted(a.rows)), a.seconds or 0.5)
    if a.plot:
        plot(a.plot, results, picture_title(description, a.size))
    report.finish(a.json, description, {"speed": results})


def picture_title(machine: dict[str, Any], size: str) -> str:
    """What was measured where."""
    return (
        f"{size}, 4 bits, groups of 64 - {machine['cpu']}, {kernel_choice.instruction_set()}, "
        f"{machine['threads']} threads, torch {machine['torch']}"
    )


if __name__ == "__main__":
    main()
