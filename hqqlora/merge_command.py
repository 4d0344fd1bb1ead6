"""`hqqlora merge`: an adapter and its base as one model, in a folder that needs no PEFT."""

from __future__ import annotations

import argparse
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqqlora.command.adapter_source import find_base
from hqqlora.command.errors import UsageError, explaining, writing
from hqqlora.command.model_source import load_model, load_tokenizer
from hqqlora.command.packages import require
from hqqlora.files import creating_folder
from hqqlora.linear import HQQLinear


@dataclass(frozen=True)
class MergeOptions:
    """What to merge into what."""

    adapter: Path
    output: Path
    base: str | None = None
    dense: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option to `parser`."""
    parser.add_argument(
        "adapter",
        type=Path,
        metavar="ADAPTER",
        help="the folder of an adapter, as hqqlora train and PEFT write it",
    )
    parser.add_argument(
        "output", type=Path, metavar="OUT", help="the folder to write, which must not exist"
    )
    parser.add_argument(
        "--base",
        metavar="PATH",
        help="the causal language model that it is for: a folder, dense or quantized, a .gguf "
        "file, or the name of one that has been downloaded before (default: the one that the "
        "adapter names)",
    )
    parser.add_argument(
        "--dense",
        action="store_true",
        help="write dense weights, of which nothing is lost, where the base is quantized; "
        "they have to fit into memory (default: quantize the sums again, as the base is)",
    )


def from_namespace(namespace: argparse.Namespace) -> MergeOptions:
    """The options of a parsed command line."""
    return MergeOptions(namespace.adapter, namespace.output, namespace.base, namespace.dense)


def run(options: MergeOptions) -> None:
    """Loads both, merges, and writes the folder: whole, or not at all.

    Raises:
        UsageError: a package is missing; the output exists; there is no adapter, or no base
            for it; or PEFT cannot merge the two.
        RunError: the folder cannot be written.
    """
    require("transformers", "accelerate")
    if os.path.lexists(options.output):
        raise UsageError(f"{options.output} exists already: give the name of a new folder")
    source = find_base(options.adapter, options.base)
    tokenizer = load_tokenizer(source)
    model = load_model(source, "auto")
    with explaining(f"cannot merge {options.adapter} into {source.path}"):
        merged, described = _merge(model, options.adapter, options.dense)
    with writing(options.output), creating_folder(options.output) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    size = sum(path.stat().st_size for path in options.output.iterdir())
    print(f"merged: {described}\nwritten: {options.output}, {size / 1e6:,.1f} MB")


def _merge(model: Any, adapter: Path, dense: bool) -> tuple[Any, str]:
    """The model with the adapter in its weights, and what was done, in words."""
    import peft

    from hqqlora.peft import merge_and_unload, requantization_errors

    quantized = any(isinstance(module, HQQLinear) for module in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of codes that are rounded: said once below
        tuned = peft.PeftModel.from_pretrained(model, str(adapter))
        if quantized and not dense:
            tuned.merge_adapter(safe_merge=True)
            errors = requantization_errors(tuned)
        merged = merge_and_unload(tuned, dequantize=dense and quantized, safe_merge=True)
    if not quantized or dense:
        return merged, "into dense weights"
    mean = sum(errors.values()) / max(len(errors), 1)
    return merged, (
        f"into {len(errors)} layers, quantized again: {mean:.1%} of a weight, relative to its "
        f"norm, is rounding, {max(errors.values(), default=0):.1%} at most (none with --dense)"
    )
