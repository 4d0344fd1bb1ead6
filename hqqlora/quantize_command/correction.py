"""The adapter that `hqqlora quantize --correction` writes beside the quantized weights: the B A
nearest to what each layer has lost, in PEFT's format, in the subfolder `correction`.

Each file of weights has a file of factors with it, hidden until the end, when all of them
become one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqqlora.adapter_files import CONFIG_FILE, CORRECTION_FOLDER, WEIGHTS_FILE
from hqqlora.command.errors import UsageError
from hqqlora.command.safetensors_file import FileLayout, FileWriter, read_header, total_bytes
from hqqlora.command.units import in_units
from hqqlora.files import naming, remove_folder, replacing_file, write_json
from hqqlora.low_rank import correction
from hqqlora.module_names import last_parts_or_names
from hqqlora.ops.weight import word_dtype
from hqqlora.quantize_command.step import Step

_PARTS = ".correction"


def with_correction(steps: Iterable[Step], rank: int) -> list[Step]:
    """The steps, with a correction of every layer that is no expert.

    Raises:
        UsageError: a layer has a side shorter than the rank, or there is no such layer.
    """
    corrected = []
    for step in steps:
        if step.metadata is not None and not step.is_stack:
            shape = step.matrices[0].shape
            if rank > min(shape):
                raise UsageError(
                    f"--correction {rank}: {step.source.name} is {list(shape)}, no correction "
                    f"of it has a rank above {min(shape)}"
                )
            step = replace(step, correction=rank)
        corrected.append(step)
    if not any(step.correction for step in corrected):
        raise UsageError(f"--correction {rank}: nothing but experts is quantized")
    return corrected


def adapter_config(model: Any, steps: Iterable[Step], rank: int) -> dict[str, Any]:
    """PEFT's configuration, but for the base's name. `model` has the names of all modules."""
    from hqqlora.adapters import task_type

    layers = {step.module for step in steps if step.correction}
    names = (name for name, _ in model.named_modules())
    return {
        "peft_type": "LORA",
        "task_type": task_type(model),
        "inference_mode": True,
        "target_modules": last_parts_or_names(layers, names),
        "r": rank,
        # As `hqqlora train` has it unless told otherwise: rates mean the same.
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


@torch.no_grad()
def correction_of(step: Step, quantized: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors of a layer, from what it has become. The weight is read a second time, in
    pieces, so that it is not in memory beside the error, which is float32."""
    metadata = step.metadata
    assert metadata is not None
    W_q, scale, zero = (quantized[key] for key in ("W_q", "scale", "zero"))
    W_q = W_q.view(word_dtype(metadata.settings.nbits))  # (view_as_float)
    error = torch.ops.hqqlora.dequantize(W_q, scale, zero, *metadata.format, torch.float32)
    for stored, place in step.matrices[0].beside(error):
        torch.sub(stored.to(step.work_dtype).float(), place, out=place)
    B, A = correction(error, step.correction, step.importance)
    return {"lora_A": A, "lora_B": B / 2}  # the scaling: lora_alpha / r


def layout_of_factors(steps: Sequence[Step]) -> FileLayout | None:
    """How the file of the factors of `steps` is laid out; None: they have none."""
    shapes = {key: shape for step in steps for key, shape in step.factors().items()}
    return FileLayout(shapes) if shapes else None


def part_of(shard: Path) -> Path:
    """Where the factors of the layers in the file `shard` are until the end."""
    return shard.parent / _PARTS / shard.name


def finish_correction(
    folder: Path, shards: Mapping[str, Sequence[Step]], config: Mapping[str, Any]
) -> None:
    """Makes one adapter of all parts, tensor by tensor, and removes them. An adapter of a run
    that was killed after this stays."""
    target = folder / CORRECTION_FOLDER
    weights = target / WEIGHTS_FILE
    layout = layout_of_factors([step for steps in shards.values() for step in steps])
    assert layout is not None
    if not layout.is_in(weights):
        with naming(target):
            target.mkdir(exist_ok=True)
        parts = [part_of(folder / name) for name in shards if layout_of_factors(shards[name])]
        with replacing_file(weights) as temporary, ExitStack() as files:
            descriptor = os.open(temporary, os.O_WRONLY)
            files.callback(os.close, descriptor)
            with naming(weights):
                writer = FileWriter(descriptor, layout)
            for part in parts:
                for name, stored in read_header(part).items():
                    tensor = stored.read()
                    with naming(weights):
                        writer.write(name, tensor)
    base = {"base_model_name_or_path": str(folder.resolve())}
    write_json(target / CONFIG_FILE, {**config, **base})
    if (folder / _PARTS).is_dir():
        remove_folder(folder / _PARTS)


def is_part_done(folder: Path, name: str, shards: Mapping[str, Sequence[Step]]) -> bool:
    """Whether the factors of the layers in the file `name` are there, on their own or among
    all."""
    part = layout_of_factors(shards[name])
    if part is None or part.is_in(part_of(folder / name)):
        return True
    whole = layout_of_factors([step for steps in shards.values() for step in steps])
    return whole is not None and whole.is_in(folder / CORRECTION_FOLDER / WEIGHTS_FILE)


def describe_correction(steps: Sequence[Step]) -> str:
    """How large it is, and what it leaves out."""
    corrected = [step for step in steps if step.correction]
    shapes = [shape for step in corrected for shape in step.factors().values()]
    size = total_bytes(shapes)
    text = (
        f"correction: rank {corrected[0].correction}, of {len(corrected)} layers, "
        f"{size / 4e6:,.2f} M parameters, {in_units(size)} more"
    )
    experts = sum(len(step.matrices) for step in steps if step.is_stack)
    return text + (f"; {experts:,} matrices of experts are left out" if experts else "")
