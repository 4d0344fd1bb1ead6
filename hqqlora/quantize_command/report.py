"""What `hqqlora quantize` says before and after."""

from __future__ import annotations

from collections.abc import Sequence

from hqqlora.command.safetensors_file import total_bytes
from hqqlora.command.units import in_units
from hqqlora.module_names import numbers_as_stars
from hqqlora.quantize_command.correction import describe_correction
from hqqlora.quantize_command.plan import Plan
from hqqlora.quantize_command.sizes import bits_per_weight
from hqqlora.quantize_command.step import Step


def describe_plan(plan: Plan) -> str:
    """What is quantized, and by name what is not."""
    layers = plan.layers
    weights = sum(step.numel for step in layers)
    before = sum(step.nbytes for step in layers)
    after = sum(total_bytes(step.results().values()) for step in layers)
    lines = [
        f"quantized: {_counted(layers)}, {weights / 1e6:,.1f} M weights, "
        f"{in_units(before)} -> {in_units(after)} ({bits_per_weight(layers):.2f} bits a weight)"
    ]
    dense = sum(total_bytes(step.results().values()) for step in plan.dense)
    lines.append(f"dense: {len(plan.dense)} tensors, {in_units(dense)}")
    lines += [f"  {line}" for line in _by_kind(plan.dense)]
    if plan.adapter is not None:
        lines.append(describe_correction(plan.layers))
    if plan.left_out:
        lines.append("left out:")
        lines += [f"  {name}: {why}" for name, why in plan.left_out.items()]
    return "\n".join(lines)


def describe_importance(plan: Plan) -> str:
    """For how many layers it is known."""
    known = [step for step in plan.layers if step.importance is not None]
    text = f"importance: of {len(known)} layers, from random tokens"
    unknown = [step.layer for step in plan.layers if step.importance is None]
    if unknown:
        text += f"; the other {len(unknown)} are quantized without, such as {unknown[0]}"
    return text


def _counted(layers: Sequence[Step]) -> str:
    stacks = [step for step in layers if step.is_stack]
    text = f"{len(layers) - len(stacks)} layers"
    if stacks:
        text += f" and {sum(len(step.matrices) for step in stacks):,} matrices of experts"
    return text


def _by_kind(steps: Sequence[Step]) -> list[str]:
    kinds: dict[tuple[str, str], list[Step]] = {}
    for step in steps:
        kinds.setdefault((numbers_as_stars(step.source.name), step.why_dense), []).append(step)
    rows = []
    for (pattern, why), members in kinds.items():
        size = sum(total_bytes(step.results().values()) for step in members)
        count = f"{len(members)} x " if len(members) > 1 else ""
        rows.append((f"{count}{pattern}", in_units(size), f"  ({why})" if why else ""))
    name_width = max((len(name) for name, _, _ in rows), default=0)
    size_width = max((len(size) for _, size, _ in rows), default=0)
    return [f"{name:<{name_width}}  {size:>{size_width}}{why}" for name, size, why in rows]
