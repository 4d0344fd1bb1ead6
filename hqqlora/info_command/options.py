"""The options of `hqqlora info`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class InfoOptions:
    """What to look at, and how to show it."""

    folder: Path
    against: str | None = None
    layers: bool = False
    plot: Path | None = None
    json: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option to `parser`."""
    parser.add_argument(
        "folder",
        type=Path,
        metavar="PATH",
        help="a folder of a quantized model (of hqqlora quantize, save_pretrained, or hqq's "
        "save_quantized), of a dense one, or of a LoRA adapter",
    )
    parser.add_argument(
        "--against",
        metavar="SRC",
        help="the dense model: shows the error of each layer, |W - Q| / |W|",
    )
    parser.add_argument(
        "--layers", action="store_true", help="a row for every layer, not for each kind"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="draw bits a weight (and with --against the error) by layer",
    )
    parser.add_argument(
        "--json", action="store_true", help="print everything as JSON instead of a table"
    )


def from_namespace(namespace: argparse.Namespace) -> InfoOptions:
    """The options of a parsed command line."""
    return InfoOptions(
        namespace.folder, namespace.against, namespace.layers, namespace.plot, namespace.json
    )
