"""The options of `hqqlora quantize`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hqqlora.command.errors import UsageError
from hqqlora.command.options import group_size_or_none, non_negative_integer, number
from hqqlora.config import SOLVERS, SUPPORTED_BITS
from hqqlora.ops.adapter_checks import MAX_RANK

DTYPES = ("auto", "bfloat16", "float16", "float32")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class QuantizeOptions:
    """What to quantize, where to, and how; see `hqqlora.HqqConfig`."""

    source: str
    destination: Path | None
    bits: int = 4
    group_size: int | None = 64
    axis: int = 1
    solver: str = "default"
    dynamic_config: Mapping[str, Any] | None = None
    skip_modules: tuple[str, ...] = ("lm_head",)
    importance: bool = False
    correction: int | None = None
    dtype: str = "auto"
    max_shard_size: int = 5 * 10**9
    threads: int = 0
    dry_run: bool = False

    def deciding(self) -> dict[str, Any]:
        """Those that decide what is written, as plain values."""
        values = asdict(self)
        for free in ("source", "destination", "threads", "dry_run"):
            del values[free]
        return {**values, "skip_modules": list(self.skip_modules)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option to `parser`."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a dense model: the folder of a Hugging Face model in safetensors files, or the "
        "name of one that has been downloaded before",
    )
    parser.add_argument(
        "destination",
        nargs="?",
        type=Path,
        metavar="DST",
        help="the folder to write: new, empty, or one that an interrupted run has begun "
        "(not needed with --dry-run)",
    )
    format_ = parser.add_argument_group("quantization")
    format_.add_argument(
        "--bits",
        type=int,
        choices=SUPPORTED_BITS,
        default=4,
        help="bits a weight (default: %(default)s)",
    )
    format_.add_argument(
        "--group-size",
        type=group_size_or_none,
        default=64,
        metavar="WEIGHTS",
        help="weights that share one scale and zero; 'none': a whole row or column "
        "(default: %(default)s)",
    )
    format_.add_argument(
        "--axis",
        type=int,
        choices=(1, 0),
        default=1,
        help="groups run along a row (1) or down a column (0) (default: %(default)s)",
    )
    format_.add_argument(
        "--solver",
        choices=SOLVERS,
        default="default",
        help="how scale and zero are found: 'reference' computes what hqq does, 'minmax' takes "
        "each group's range (default: %(default)s)",
    )
    format_.add_argument(
        "--dynamic-config",
        type=_dynamic_config,
        metavar="JSON",
        help="other settings for some layers, in JSON or a file of it, as HqqConfig takes "
        'them: {"attn": {"nbits": 4}, "mlp": {"nbits": 2, "group_size": 32}}; layers under no '
        "key stay dense",
    )
    format_.add_argument(
        "--skip-modules",
        nargs="*",
        default=["lm_head"],
        metavar="NAME",
        help="layers to leave dense: names, their last parts, or patterns (default: lm_head)",
    )
    format_.add_argument(
        "--importance",
        action="store_true",
        help="fit scales and zeros to what 512 random tokens send through each layer of the "
        "dense model, which reads its weights layer by layer (needs accelerate)",
    )
    format_.add_argument(
        "--correction",
        type=number(int, 1, MAX_RANK, f"a rank from 1 to {MAX_RANK}"),
        metavar="RANK",
        help="also write an adapter, to DST/correction: the nearest of that rank to what each "
        "layer loses, with --importance of its outputs; hqqlora train then begins with it",
    )
    format_.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of what stays dense, and of scales and zeros; auto: the model's own "
        "(default: %(default)s)",
    )
    work = parser.add_argument_group("work")
    work.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="of a file; an interrupted run goes on after the last whole one "
        "(default: %(default)s)",
    )
    work.add_argument(
        "--threads",
        type=non_negative_integer,
        default=0,
        metavar="THREADS",
        help="threads; 0: one a core (default: %(default)s)",
    )
    work.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing: say what would be written, and how large the model is for each "
        "choice of bits and group size",
    )


def from_namespace(namespace: argparse.Namespace) -> QuantizeOptions:
    """The options of a parsed command line."""
    if namespace.destination is None and not namespace.dry_run:
        raise UsageError("DST is missing: give the folder to write, or --dry-run")
    if namespace.importance and namespace.solver != "default":
        raise UsageError(f"--importance needs --solver default, not {namespace.solver}")
    names = QuantizeOptions.__dataclass_fields__
    values = {name: value for name, value in vars(namespace).items() if name in names}
    return QuantizeOptions(**{**values, "skip_modules": tuple(namespace.skip_modules)})


def _dynamic_config(text: str) -> dict[str, Any]:
    try:
        if not text.lstrip().startswith("{"):
            text = Path(text).read_text(encoding="utf-8")
        value = json.loads(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text}: {error.strerror}") from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict) or not value:
        raise argparse.ArgumentTypeError("not a JSON object with a key for each kind of layer")
    return value


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    return size
