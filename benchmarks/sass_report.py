"""What nvcc made of each CUDA kernel, what that predicts, and whether both are good enough.

    python benchmarks/sass_report.py                  of the built library: report, check gates
    python benchmarks/sass_report.py --archs sm_90    one architecture
    python benchmarks/sass_report.py FILE.cubin ...   only describe these kernels

Reads the kernels out of build/release, where pip built the CUDA library (make sass does both);
what changed since is compiled first. Needs nvcc, cuobjdump and nvdisasm, which PyPI has as
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm; no GPU. Times are predictions from instruction
counts and bytes: sass/assumptions.py says what they take for granted. Writes
build/sass/report.json, and exits with 1 where a gate of gates.json does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sass import built, facts, gates, launches, predict, tables, toolchain
from sass.toolchain import Kernel, ToolError

ROOT = toolchain.ROOT
ARCHS = ("sm_80", "sm_90")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cubins", nargs="*", type=Path)
    parser.add_argument("--archs", nargs="+", default=list(ARCHS))
    parser.add_argument(
        "--build", type=Path, default=ROOT / "build/release", help="CMake's tree"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build/sass")
    parser.add_argument("--gates", type=Path, default=Path(__file__).with_name("gates.json"))
    parser.add_argument(
        "--all", action="store_true", help="tables of all kernels, devices and shapes"
    )
    return parser


def report(kernels: Sequence[Kernel], folder: Path) -> dict[str, Any]:
    """Facts of all kernels, and predictions from them."""
    known = launches.build([k.name for k in kernels], folder)
    return {
        "kernels": [facts.facts_of(k, known.of(k.name)) for k in kernels],
        "predictions": predict.predict(kernels, known),
    }


def judge(path: Path, found: dict[str, Any], archs: Sequence[str]) -> int:
    """Prints the verdict; the exit status."""
    asked = gates.for_archs(json.loads(path.read_text()), archs)
    verdicts = (
        gates.check_kernels(asked, found["kernels"]),
        gates.check_predictions(asked, found["predictions"]),
    )
    missed = [line for verdict in verdicts for line in verdict.missed]
    failures = [line for verdict in verdicts for line in verdict.failures]
    checked = sum(verdict.checked for verdict in verdicts)
    if missed:
        print(f"\n### Targets missed ({len(missed)})\n")
        print("\n".join(f"- {line}" for line in missed))
    if failures:
        print(f"\n### Gates broken ({len(failures)} of {checked} checks)\n")
        print("\n".join(f"- {line}" for line in failures))
        return 1
    print(f"\nAll gates hold ({checked} checks).")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    a = options().parse_args(arguments)
    try:
        if a.cubins:
            kernels = [k for cubin in a.cubins for k in toolchain.read_kernels(cubin)]
            print(tables.kernels([facts.facts_of(k) for k in kernels], everything=True))
            return 0
        toolchain.need_all()
        kernels = built.kernels(a.build, a.archs, a.out)
        found = report(kernels, a.out)
    except ToolError as error:
        sys.exit(f"sass_report: {error}")
    (a.out / "report.json").write_text(json.dumps(found, indent=1))
    print(tables.kernels(found["kernels"], everything=a.all))
    print(tables.predictions(found["predictions"], everything=a.all))
    return judge(a.gates, found, a.archs)


if __name__ == "__main__":
    sys.exit(main())
