"""`hqqlora export gguf-adapter`: an adapter's folder as a GGUF file."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqqlora.command.adapter_source import find_base
from hqqlora.command.errors import explaining, writing
from hqqlora.command.model_source import LOCAL, ModelSource, quiet_transformers
from hqqlora.command.packages import require


@dataclass(frozen=True)
class ExportAdapterOptions:
    """What to write where; see `hqqlora.export_gguf_adapter`."""

    adapter: Path
    output: Path
    base: str | None = None
    type: str = "F32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option to `parser`."""
    parser.add_argument(
        "adapter",
        type=Path,
        metavar="ADAPTER",
        help="the folder of a LoRA adapter, as hqqlora train and PEFT write it",
    )
    parser.add_argument(
        "output", type=Path, metavar="OUT.gguf", help="the file to write, replaced if it exists"
    )
    parser.add_argument(
        "--base",
        metavar="PATH",
        help="the model that it is for, of which the configuration is read: a folder, a .gguf "
        "file, or the name of one that has been downloaded before (default: the one that the "
        "adapter names)",
    )
    parser.add_argument(
        "--type",
        choices=("F32", "F16", "BF16"),
        default="F32",
        help="of the factors (default: %(default)s)",
    )


def from_namespace(namespace: argparse.Namespace) -> ExportAdapterOptions:
    """The options of a parsed command line."""
    return ExportAdapterOptions(
        namespace.adapter, namespace.output, namespace.base, namespace.type
    )


def run(options: ExportAdapterOptions) -> None:
    """Reads the adapter and its base's configuration, and writes the file.

    Raises:
        UsageError: a package is missing, there is no adapter or no base for it, or something in
            it has no place in GGUF. Nothing is written.
        RunError: the file cannot be written.
    """
    require("transformers", "gguf")
    source = find_base(options.adapter, options.base)
    from hqqlora.gguf import export_gguf_adapter

    config = _config_of(source)
    with explaining(f"cannot export {options.adapter}"), writing(options.output):
        export_gguf_adapter(options.adapter, options.output, config, type=options.type)
    print(f"written: {options.output}, {options.output.stat().st_size / 1e6:,.1f} MB")


def _config_of(source: ModelSource) -> Any:
    transformers = quiet_transformers()
    arguments = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    with explaining(f"cannot read the configuration of {source.path}"):
        return transformers.AutoConfig.from_pretrained(source.folder, **LOCAL, **arguments)
