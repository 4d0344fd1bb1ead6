"""Every op on a GPU, against dense torch, hqq and bitsandbytes, as far as they are installed.

    python benchmarks/gpu_bench.py                    a few minutes; needs a CUDA device
    python benchmarks/gpu_bench.py --dry-run          the same flow on the CPU, with tiny shapes

Prints Markdown, and writes it and all figures as JSON to --out. Where the static report was
made before (make sass), its predictions stand beside the measurements.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu import figures, stamp
from gpu.clock import Clock, DeviceClock, HostClock
from gpu.contenders import GROUP, OPS, WITHOUT_ROWS, Contenders, Weights
from timing import take_turns

from hqqlora.config import SUPPORTED_BITS

ROOT = Path(__file__).resolve().parents[1]
# Llama 3: 8B, then 70B. In the order of interest: time may run out.
SHAPES = (
    (4096, 14336),
    (14336, 4096),
    (8192, 8192),
    (4096, 4096),
    (28672, 8192),
    (8192, 28672),
    (1024, 4096),
    (1024, 8192),
)
ROWS = (1, 8, 16, 64, 512, 4096)
TINY_SHAPES = ((64, 128), (128, 64))
TINY_ROWS = (1, 8)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    op: str
    N: int
    K: int
    M: int

    def __str__(self) -> str:
        return f"{self.op} {self.N}x{self.K}" + f" M={self.M}" * bool(self.M)


def cases(
    op_names: Sequence[str], shapes: Sequence[tuple[int, int]], rows: Sequence[int]
) -> Iterator[Case]:
    """A shape at a time: its weights are made once."""
    for N, K in shapes:
        for op in op_names:
            for M in (0,) if op in WITHOUT_ROWS else rows:
                yield Case(op, N, K, M)


@dataclass
class Bench:
    clock: Clock
    device: str
    device_name: str
    dtype: torch.dtype
    predictions: list[dict[str, Any]]
    seconds: float
    """For each case."""
    nbits: int = 4
    rows: list[figures.Row] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def working(self, case: Case, contenders: Contenders) -> Contenders:
        """Those that run at all: a rival that cannot is named, and does not end the run."""
        found = {}
        for name, contender in contenders.items():
            try:
                contender(0)
                if self.device == "cuda":
                    torch.cuda.synchronize()
                found[name] = contender
            except Exception as error:
                first_line = str(error).partition("\n")[0]
                self.failed.append(f"{case}: {name}: {type(error).__name__}: {first_line}")
        return found

    def measure(self, case: Case, weights: Weights) -> None:
        op, N, K, M = case
        contenders = self.working(case, OPS[op](weights, M))
        if "hqqlora" not in contenders:
            return
        times = take_turns(contenders, self.seconds, measure=self.clock.seconds)
        ours = times.median("hqqlora")
        self.rows.append(
            {
                **case._asdict(),
                "seconds": times.summary(),
                "ratio": {
                    name: times.ratio(name, "hqqlora")
                    for name in contenders
                    if name != "hqqlora"
                },
                "tflops": figures.flops(op, M, N, K) / ours / 1e12,
                "gbytes": figures.least_bytes(op, M, N, K, weights.nbits, GROUP) / ours / 1e9,
                "host_seconds": self.clock.host_seconds(contenders["hqqlora"]),
                "predicted": figures.predicted(self.predictions, self.device_name, op, N, K, M),
            }
        )

    def run(self, todo: Sequence[Case], peers: tuple[str, ...], until: float) -> list[str]:
        """Measures case after case; returns those for which there was no time."""
        weights: Weights | None = None
        for position, case in enumerate(todo):
            if time.monotonic() > until:
                return [str(case) for case in todo[position:]]
            if weights is None or (weights.N, weights.K) != (case.N, case.K):
                weights = None  # its memory first
                weights = Weights(case.N, case.K, self.dtype, self.device, peers, self.nbits)
            self.measure(case, weights)
            print(f"{case}", file=sys.stderr, flush=True)
        return []


def refuse_without_device() -> None:
    """Ends the program where there is nothing to measure on, and says what is missing."""
    if not torch.cuda.is_available():
        cuda = torch.version.cuda
        build = f"was built for CUDA {cuda}" if cuda else "was built without CUDA"
        sys.exit(
            f"gpu_bench: no CUDA device (torch {torch.__version__} {build}); "
            "--dry-run runs the flow on the CPU"
        )
    try:
        weight = torch.ones(8, 64, device="cuda")
        torch.ops.hqqlora.quantize(weight, 4, 64, 1, torch.float32)
    except RuntimeError as error:
        sys.exit(f"gpu_bench: hqqlora does not run on {torch.cuda.get_device_name()}: {error}")


def read_predictions(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    predictions: list[dict[str, Any]] = json.loads(path.read_text())["predictions"]
    return predictions


def parse_shape(text: str) -> tuple[int, int]:
    N, K = map(int, text.split("x"))
    return N, K


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny shapes")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=tuple(OPS))
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="NxK")
    parser.add_argument("--rows", nargs="+", type=int, metavar="M")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--nbits", type=int, choices=SUPPORTED_BITS, default=4)
    parser.add_argument("--peers", nargs="*", default=("hqq", "bitsandbytes"))
    parser.add_argument("--seconds", type=float, default=0.25, help="a case (default 0.25)")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds in all (240)")
    parser.add_argument("--predictions", type=Path, default=ROOT / "build/sass/report.json")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build/gpu", help="folder of gpu_bench.{json,md}"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    a = options().parse_args(arguments)
    torch.manual_seed(0)
    if not a.dry_run:
        refuse_without_device()
    device = "cpu" if a.dry_run else "cuda"
    facts = stamp.describe(device)
    bench = Bench(
        clock=HostClock() if a.dry_run else DeviceClock(),
        device=device,
        device_name=facts["device"],
        dtype=DTYPES[a.dtype],
        predictions=read_predictions(a.predictions) if a.nbits == 4 else [],
        seconds=0.0 if a.dry_run else a.seconds,
        nbits=a.nbits,
    )
    shapes = a.shapes or (TINY_SHAPES if a.dry_run else SHAPES)
    rows = a.rows or (TINY_ROWS if a.dry_run else ROWS)
    todo = list(cases(a.ops, shapes, rows))
    left_out = bench.run(todo, tuple(a.peers), time.monotonic() + a.limit)

    heading = stamp.in_words(facts)
    if a.dry_run:
        heading += " A dry run on the CPU: these figures say nothing about a GPU."
    text = figures.document(heading, a.nbits, bench.rows, left_out, bench.failed)
    print(text)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "gpu_bench.md").write_text(text)
    results = {"rows": bench.rows, "left_out": left_out, "failed": bench.failed}
    chosen = {"dtype": a.dtype, "nbits": a.nbits, "dry_run": a.dry_run}
    stamped = {"machine": facts, **chosen, **results}
    (a.out / "gpu_bench.json").write_text(json.dumps(stamped, indent=1))
    return int(any(": hqqlora" in line for line in bench.failed) or not bench.rows)


if __name__ == "__main__":
    sys.exit(main())
