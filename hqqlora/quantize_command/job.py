"""`hqqlora quantize`, from the options to the last file."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import hqqlora
from hqqlora.command.checkpoint_folder import DenseCheckpoint
from hqqlora.command.errors import RunError, UsageError, describe
from hqqlora.command.machine import peak_memory
from hqqlora.command.packages import require
from hqqlora.command.units import in_units
from hqqlora.quantize_command.correction import (
    finish_correction,
    is_part_done,
    layout_of_factors,
)
from hqqlora.quantize_command.destination import Destination, open_destination
from hqqlora.quantize_command.options import QuantizeOptions
from hqqlora.quantize_command.plan import Plan
from hqqlora.quantize_command.plan_apart import plan_apart, plan_here
from hqqlora.quantize_command.report import describe_importance, describe_plan
from hqqlora.quantize_command.shards import index_of, into_shards
from hqqlora.quantize_command.sizes import model_bytes, size_table
from hqqlora.quantize_command.step import Step
from hqqlora.quantize_command.stream import Stream, layout_of


def run(options: QuantizeOptions) -> None:
    """Does what `hqqlora quantize` was asked for.

    Raises:
        UsageError: the model or an option is at fault, or the destination holds other things.
            Nothing is lost, and no file is half written.
        RunError: the disk is full, or another process is writing there. The same command goes
            on from there.
    """
    require("transformers")
    checkpoint, plan = (plan_here if options.dry_run else plan_apart)(options)
    for warning in plan.warnings:
        print(f"hqqlora quantize: {warning}", file=sys.stderr)
    if options.dry_run:
        _describe_sizes(checkpoint, plan)
        return
    assert options.destination is not None
    if options.destination.resolve() == checkpoint.folder.resolve():
        raise UsageError("SRC and DST are the same folder")
    if options.threads:
        torch.set_num_threads(options.threads)
    shards = into_shards(plan.steps, options.max_shard_size)
    state = {
        "source": str(checkpoint.folder.resolve()),
        "fingerprint": checkpoint.fingerprint(),
        "version": hqqlora.__version__,
        "options": options.deciding(),
    }
    print(describe_plan(plan), flush=True)
    if options.importance:
        print(describe_importance(plan), flush=True)
    with open_destination(options.destination, state) as destination:
        try:
            _work(checkpoint, plan, shards, destination)
        except OSError as error:
            raise RunError(f"{describe(error)}; the same command goes on from here") from error


def _describe_sizes(checkpoint: DenseCheckpoint, plan: Plan) -> None:
    dense = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    print(describe_plan(plan))
    print(f"\nthe whole model: {in_units(dense)} -> {in_units(model_bytes(plan))}")
    print("with the same layers in other formats:\n")
    print(size_table(plan))


def _work(
    checkpoint: DenseCheckpoint,
    plan: Plan,
    shards: Mapping[str, Sequence[Step]],
    destination: Destination,
) -> None:
    layouts = {name: layout_of(steps) for name, steps in shards.items()}
    missing = [
        name
        for name, layout in layouts.items()
        if not (
            destination.is_done(name, layout) and is_part_done(destination.folder, name, shards)
        )
    ]
    needed = sum(layouts[name].size for name in missing)
    if factors := layout_of_factors(plan.steps):
        needed += 2 * factors.size  # in parts, and as one
    _check_space(destination.folder, needed)
    started = time.perf_counter()
    if len(missing) < len(shards):
        print(f"going on: {len(shards) - len(missing)} of {len(shards)} files are done")
    weights = {name: sum(step.numel for step in shards[name]) for name in shards}
    to_do = sum(weights[name] for name in missing)
    with _progress(sum(weights.values()), sum(weights.values()) - to_do) as progress:
        stream = Stream(plan.steps, progress.update)
        for name in missing:
            stream.write_shard(destination.folder / name, shards[name])
    if plan.adapter is not None:
        finish_correction(destination.folder, shards, plan.adapter)
    destination.finish(plan.config, index_of(shards), checkpoint.other_files())
    seconds = time.perf_counter() - started
    size = sum(layout.size for layout in layouts.values())
    print(
        f"written: {destination.folder}, {in_units(size)} in {len(shards)} "
        f"file{'s' * (len(shards) > 1)}, in {seconds:.0f} s ({to_do / seconds / 1e6:,.0f} M "
        f"weights/s), peak memory {in_units(peak_memory())}"
    )


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{folder} needs {in_units(needed)} more, but its disk has {in_units(free)} free; "
            "the same command goes on when there is room"
        )


def _progress(weights: int, done: int) -> Any:
    shown = sys.stderr.isatty()
    return tqdm(
        total=weights,
        initial=done,
        desc="quantizing",
        unit=" weights",
        unit_scale=True,
        mininterval=0.2 if shown else 30,
        smoothing=0.1,
    )
