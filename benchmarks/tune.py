"""Which kernel is fastest for how many tokens: the thresholds of c_api/choose_kernel.c.

Each kernel runs in a process of its own (HQQLORA_KERNEL is read once), and the processes take
turns, so that what slows one round slows it for all. Prints the times, what the library would
choose, and the row of the table for this machine's instruction set as C. Nothing is
written: a row that differs by more than the noise is a reason to edit the table.

    python benchmarks/tune.py --size 4096x4096 --dtypes bf16 --passes forward
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import report
import torch
from kernel_choice import COLUMNS, Weight, chosen, instruction_set
from layers import DTYPES, quantize

from hqqlora.ops import PackedWeight

KERNELS = ("direct", "tiled", "blocked")
PASSES = ("forward", "dgrad")
ROWS = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048)
LEAST_ROUNDS, MOST_ROUNDS = 7, 50
# A kernel is not timed again once it takes that many times the fastest: direct, whose time
# grows with the tokens, and from 64 tokens on blocked, where torch has no fast GEMM of the
# dtype (fp16 without AVX512_FP16: a second for 2048 tokens).
HOPELESS = {"direct": (2.0, 1), "blocked": (4.0, 64)}


@dataclass(frozen=True)
class Thresholds:
    """Up to how many tokens; None: any number."""

    direct: int | None
    tiled: int | None

    def __str__(self) -> str:
        direct, tiled = ("ANY" if rows is None else rows for rows in (self.direct, self.tiled))
        return f"{{{direct}, {tiled}}}"


def thresholds(times: dict[int, dict[str, float]]) -> Thresholds:
    """From the seconds of each kernel by tokens: the two places to switch at that make the sum
    of time / least time over all tokens the smallest. A kernel that was not timed is never the
    choice."""
    rows = sorted(times)
    ends = [0, *rows]

    def regret(direct: int, tiled: int) -> float:
        total = 0.0
        for m in rows:
            kernel = "direct" if m <= direct else "tiled" if m <= tiled else "blocked"
            total += times[m].get(kernel, float("inf")) / min(times[m].values())
        return total

    best = min(
        ((direct, tiled) for direct in ends for tiled in ends if tiled == 0 or tiled >= direct),
        key=lambda ends: regret(*ends),
    )
    direct, tiled = (None if end == rows[-1] else end for end in best)
    return Thresholds(direct, tiled)


def serve(size: str, dtype: str, nbits: int, axis: int, threads: int, copies: int) -> None:
    """A process of one kernel: for each line "pass M round" one with the seconds it took."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    N, K = map(int, size.split("x"))
    packed = quantize(torch.randn(N, K).to(DTYPES[dtype]) * 0.02, nbits, 64, axis)
    weights = [
        PackedWeight(*(part.clone() for part in packed[:3]), *packed[3:]) for _ in range(copies)
    ]
    inputs: dict[tuple[str, int], torch.Tensor] = {}
    ops = torch.ops.hqqlora
    print(flush=True)  # ready
    for line in sys.stdin:
        name, rows, round_ = line.split()
        key = (name, int(rows))
        if key not in inputs:
            inputs[key] = torch.randn(key[1], K if name == "forward" else N).to(DTYPES[dtype])
        x, w = inputs[key], weights[int(round_) % copies]
        bias = (None,) if name == "forward" else ()
        product = ops.linear if name == "forward" else ops.linear_dgrad
        begin = time.perf_counter()
        product(x, *w[:3], *bias, *w[3:])
        print(time.perf_counter() - begin, flush=True)


class Contender:
    """The process of one kernel."""

    def __init__(self, kernel: str, arguments: list[str]) -> None:
        command = [sys.executable, __file__, "--serve", *arguments]
        environment = {**os.environ, "HQQLORA_KERNEL": kernel, "OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answer()

    def answer(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process ended with status {self.process.wait()}")
        return line

    def seconds(self, name: str, rows: int, round_: int) -> float:
        assert self.process.stdin
        print(name, rows, round_, file=self.process.stdin, flush=True)
        return float(self.answer())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measure(
    contenders: dict[str, Contender], name: str, rows: tuple[int, ...], seconds: float
) -> dict[int, dict[str, float]]:
    """Median seconds by tokens and kernel."""
    times: dict[int, dict[str, float]] = {}
    running = list(KERNELS)
    for m in rows:
        for kernel in running:
            contenders[kernel].seconds(name, m, 0)  # warm up
        taken: dict[str, list[float]] = {kernel: [] for kernel in running}
        start = time.perf_counter()
        for r in range(MOST_ROUNDS):
            if r >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
                break
            for kernel in running[r % len(running) :] + running[: r % len(running)]:
                taken[kernel].append(contenders[kernel].seconds(name, m, r + 1))
        times[m] = {kernel: statistics.median(all_) for kernel, all_ in taken.items()}
        least = min(times[m].values())
        for kernel, (ratio, from_rows) in HOPELESS.items():
            if kernel in running and m >= from_rows and times[m][kernel] > ratio * least:
                running.remove(kernel)
    return times


def print_times(
    times: dict[int, dict[str, float]], dtype: str, name: str, weight: Weight
) -> None:
    lines = []
    for m, seconds in times.items():
        best = min(seconds, key=lambda kernel: seconds[kernel])
        now = chosen(m, dtype, name, weight)
        cells = [report.milliseconds(seconds[k]) if k in seconds else "" for k in KERNELS]
        lost = f"{seconds[now] / seconds[best]:.2f}" if now in seconds else ""
        lines.append([str(m), *cells, best, now, lost])
    print(f"\n### {name} {dtype}\n")
    header = [
        "M",
        *(f"{kernel} ms" for kernel in KERNELS),
        "fastest",
        "chosen now",
        "x fastest",
    ]
    report.table(lines, header)


def c_rows(found: dict[tuple[str, str], Thresholds], dgrad: int) -> str:
    """The lines of the table for this instruction set; dgrad: which of its three for that."""
    columns = ["forward", "", "", ""]
    columns[1 + dgrad] = "dgrad"
    passes = [
        "{" + ", ".join(str(found.get((name, dtype), "{?, ?}")) for dtype in COLUMNS) + "}"
        for name in columns
    ]
    return f"[HQQ_ISA_{instruction_set().upper()}] = {{{', '.join(passes)}}},"


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument("--size", default="4096x4096", metavar="NxK")
    parser.add_argument("--dtypes", nargs="+", choices=COLUMNS, default=COLUMNS)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="M")
    parser.add_argument("--nbits", type=int, default=4)
    parser.add_argument("--axis", type=int, default=1)
    parser.add_argument("--copies", type=int, default=6, help="of the weight, to keep it cold")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve:
        serve(a.size, a.dtypes[0], a.nbits, a.axis, a.threads, a.copies)
        return
    description = report.start(a)
    weight = Weight(*map(int, a.size.split("x")), 64, a.nbits, a.axis)
    found: dict[tuple[str, str], Thresholds] = {}
    results: list[report.Row] = []
    for dtype in a.dtypes:
        shared = ["--size", a.size, "--dtypes", dtype, "--nbits", str(a.nbits)]
        shared += ["--axis", str(a.axis), "--threads", str(a.threads)]
        shared += ["--copies", str(a.copies)]
        contenders = {kernel: Contender(kernel, shared) for kernel in KERNELS}
        for name in a.passes:
            times = measure(contenders, name, tuple(sorted(a.rows)), a.seconds or 0.5)
            print_times(times, dtype, name, weight)
            found[name, dtype] = thresholds(times)
            results += [
                {"pass": name, "dtype": dtype, "M": m, "seconds": seconds}
                for m, seconds in times.items()
            ]
        for contender in contenders.values():
            contender.close()
    print(
        "\nUp to how many tokens {direct, tiled}; fp32, fp16, bf16; forward, dgrad in strips,"
    )
    dgrad = 2 if a.nbits == 3 else 1 - a.axis
    print(f"in residues, of other weights:\n\n    {c_rows(found, dgrad)}")
    report.finish(a.json, description, {"tune": results})


if __name__ == "__main__":
    main()
