"""How large a model is for each choice of bits and group size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hqqlora.command.safetensors_file import total_bytes
from hqqlora.command.units import in_units
from hqqlora.config import SUPPORTED_BITS
from hqqlora.quantize_command.plan import Plan
from hqqlora.quantize_command.step import Step

GROUP_SIZES = (16, 32, 64, 128, 256, None)


def model_bytes(plan: Plan) -> int:
    """The bytes of all tensors as planned."""
    return sum(total_bytes(step.results().values()) for step in plan.steps)


def model_bytes_with(plan: Plan, nbits: int, group_size: int | None) -> int | None:
    """The same, if all layers that are quantized were so with these settings; None: the group
    size does not divide a layer."""
    size = sum(total_bytes(step.results().values()) for step in plan.dense)
    for step in plan.layers:
        assert step.metadata is not None
        settings = replace(
            step.metadata.settings, nbits=nbits, group_size=group_size, view_as_float=False
        )
        metadata = replace(step.metadata, settings=settings)
        try:
            metadata.group_size  # noqa: B018 (raises)
        except ValueError:
            return None
        size += total_bytes(replace(step, metadata=metadata).results().values())
    return size


def bits_per_weight(steps: Sequence[Step]) -> float:
    """Of quantized layers: codes, scales and zeros."""
    size = sum(
        shape.nbytes
        for step in steps
        for name, shape in step.results().items()
        if name.endswith((".W_q", ".scale", ".zero"))
    )
    return 8 * size / sum(step.numel for step in steps)


def size_table(plan: Plan) -> str:
    """All choices, a row for bits, a column for group sizes."""
    head = ["bits", *(f"group {size or 'none'}" for size in GROUP_SIZES)]
    rows = [head]
    for nbits in SUPPORTED_BITS:
        sizes = [model_bytes_with(plan, nbits, group_size) for group_size in GROUP_SIZES]
        rows.append([str(nbits), *("-" if size is None else in_units(size) for size in sizes)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
