"""All benchmarks, with their defaults: what `make bench` runs. Below four minutes on two cores.

Prints Markdown. Each benchmark is also a program of its own, with more to choose:

    python benchmarks/linear.py --help
"""

from __future__ import annotations

import time

import dequantize
import linear
import lora
import quantize
import report

# Seconds for each line of a table: its share of the four minutes.
BENCHMARKS = {
    "linear": (linear.measure, 0.5),
    "lora": (lora.measure, 0.5),
    "dequantize": (dequantize.measure, 0.5),
    "quantize": (quantize.measure, 1.0),
}


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=tuple(BENCHMARKS))
    arguments = parser.parse_args()
    description = report.start(arguments)
    started = time.perf_counter()
    results = {}
    for name in arguments.only:
        measure, seconds = BENCHMARKS[name]
        results[name] = measure(seconds=arguments.seconds or seconds)
    print(f"\n{time.perf_counter() - started:.0f} seconds.")
    report.finish(arguments.json, description, results)


if __name__ == "__main__":
    main()
