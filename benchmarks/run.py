"""All benchmarks, with their defaults: what `make bench` runs, in minutes.

Prints Markdown, and leaves in a folder (build/bench) what it printed, bench.md; all figures,
bench.json; and speed against the number of tokens as a picture, speed.png. Each benchmark is
also a program of its own, with more to choose:

    python benchmarks/linear.py --help
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dequantize
import formats
import linear
import lora
import quantize
import report
import speed

# Seconds for each line of a table, so that a table takes about a minute.
BENCHMARKS = {
    "linear": (linear.measure, 0.5),
    "speed": (speed.measure, 0.4),
    "formats": (formats.measure, 3.0),
    "lora": (lora.measure, 0.5),
    "dequantize": (dequantize.measure, 0.5),
    "quantize": (quantize.measure, 1.0),
}


class Copied:
    """A stream, and a file that gets the same text."""

    def __init__(self, stream: Any, file: Any) -> None:
        self.streams = (stream, file)

    def write(self, text: str) -> int:
        for stream in self.streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self.streams:
            stream.flush()


@contextlib.contextmanager
def printed_into(path: Path) -> Iterator[None]:
    """What is printed is also written there."""
    with path.open("w") as file, contextlib.redirect_stdout(Copied(sys.stdout, file)):
        yield


def run(arguments: Any) -> None:
    description = report.start(arguments)
    started = time.perf_counter()
    results = {}
    for name in arguments.only:
        measure, seconds = BENCHMARKS[name]
        results[name] = measure(seconds=arguments.seconds or seconds)
    print(f"\n{time.perf_counter() - started:.0f} seconds.")
    report.finish(arguments.json or arguments.out / "bench.json", description, results)
    if "speed" in results:
        draw(arguments.out / "speed.png", results["speed"], description)


def draw(path: Path, results: list[report.Row], description: dict[str, Any]) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("No picture: matplotlib is not installed.")
        return
    speed.plot(path, results, speed.picture_title(description, results[0]["size"]))


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=tuple(BENCHMARKS))
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", default=Path(__file__).parents[1] / "build/bench"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with printed_into(arguments.out / "bench.md"):
        run(arguments)


if __name__ == "__main__":
    main()
