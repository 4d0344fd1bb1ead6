"""The adapter that a run begins with, where it is not a new one."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from torch import nn

import hqqlora
from hqqlora.adapter_files import CONFIG_FILE, CORRECTION_FOLDER, read_config
from hqqlora.command.errors import UsageError, explaining
from hqqlora.command.model_source import ModelSource
from hqqlora.model import lora_layers
from hqqlora.training.options import TrainOptions


def with_starting_adapter(
    options: TrainOptions, given: frozenset[str], source: ModelSource, output: Path
) -> TrainOptions:
    """The options with the adapter to begin with, if there is one: that of `--adapter`, or the
    correction in the folder of a quantized model; rank, scaling and layers are then its own.

    Args:
        options: as they were asked for.
        given: the names of those that stood on the command line.
        source: the model.
        output: the folder of the run.

    Raises:
        UsageError: there is no adapter, it is damaged or no plain LoRA, one of the `given`
            options contradicts it, or it lies in `output`, which is written anew.
    """
    folder = _folder_of(options, source)
    if folder is None:
        return options
    with explaining(f"cannot begin with the adapter {folder}"):
        config = read_config(folder)
    if output.resolve() in folder.resolve().parents:
        raise UsageError(f"the adapter {folder} lies in the output folder: give another")
    own: dict[str, Any] = {
        "rank": int(config["r"]),
        "alpha": float(config["lora_alpha"]),
        "rslora": bool(config.get("use_rslora", False)),
        "target_modules": _targets(config.get("target_modules")),
    }
    for name, value in own.items():
        asked = getattr(options, name)
        if name in given and not _same(asked, value):
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"{option} is {_shown(asked)}, but the adapter {folder} that training begins "
                f"with has {_shown(value)} (--no-correction begins anew)"
            )
    if "dropout" not in given:
        own["dropout"] = float(config.get("lora_dropout") or 0.0)
    return dataclasses.replace(options, adapter=str(folder), **own)


def insert_starting_adapter(model: nn.Module, options: TrainOptions) -> None:
    """Loads the adapter into the model, to be trained.

    Raises:
        ValueError, OSError: see `hqqlora.load_adapter`.
    """
    assert options.adapter is not None
    hqqlora.load_adapter(model, options.adapter)
    for _, layer in lora_layers(model):
        layer.lora_dropout = options.dropout


def _folder_of(options: TrainOptions, source: ModelSource) -> Path | None:
    if options.adapter is not None:
        if options.correction is not None:
            raise UsageError("--adapter and --correction exclude each other")
        folder = Path(os.path.abspath(options.adapter))
        if not (folder / CONFIG_FILE).is_file():
            raise UsageError(f"--adapter {folder} is no adapter: it has no {CONFIG_FILE}")
        return folder
    folder = Path(os.path.abspath(source.folder)) / CORRECTION_FOLDER
    found = source.gguf_file is None and (folder / CONFIG_FILE).is_file()
    if options.correction and not found:
        raise UsageError(
            f"--correction: {source.path} has none (see hqqlora quantize --correction)"
        )
    return folder if found and options.correction is not False else None


def _targets(targets: Any) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else tuple(sorted(map(str, targets or ())))


def _same(asked: Any, value: Any) -> bool:
    return set(asked) == set(value) if isinstance(value, tuple) else bool(asked == value)


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)
