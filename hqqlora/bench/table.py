"""The table of `hqqlora bench finetune`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hqqlora.bench.report import machine_lines

_COLUMNS = (
    ("", ""),
    ("quantize", "s"),
    ("step", "s"),
    ("ratio", ""),
    ("tokens", "/s"),
    ("held", "MB"),
    ("step", "MB"),
    ("loading", "peak MB"),
    ("training", "peak MB"),
    ("loss", "before"),
    ("loss", "after"),
)


def format_table(result: Mapping[str, Any]) -> str:
    """What was measured, as text with aligned columns, from the plain values of the JSON."""
    options, model, machine = result["options"], result["model"], result["machine"]
    names = list(result["contenders"])
    rows = [_row(name, result["contenders"][name]) for name in names]
    lines = [
        f"model    {model['name']}, {model['dtype']}: {model['linear_layers']} linear layers, "
        f"quantized to {model['format']}",
        f"adapter  LoRA rank {options['rank']} on each linear layer, float32",
        f"step     {options['batch']} x {options['sequence_length']} tokens: forward, "
        "backward, AdamW",
        *machine_lines(machine),
        "",
        *aligned(list(zip(*_COLUMNS, strict=True)), rows),
        "",
        *(f"{name}: {result['contenders'][name]['meaning']}" for name in names),
        *(f"{name}: not measured: {why}" for name, why in result["not_measured"].items()),
        f"step s: median of {options['rounds']} rounds in which all take turns; ratio: median "
        f"of the ratios to {names[0]} in the same round",
        "held MB: weights, adapters, AdamW's state; step MB: what a step needs beyond that; "
        "peak MB: of a whole process of its own, which gives freed memory back (the one with "
        "the times keeps it, where there is room)",
        f"loss: of the same {result['held_out_tokens']:,} held-out tokens, before and after "
        f"{result['steps']} steps on the same text",
    ]
    return "\n".join(lines)


def aligned(header: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines: the first column to the left, the others to the right, a rule below the header."""
    widths = [max(map(len, column)) for column in zip(*header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        right = [f"{cell:>{width}}" for cell, width in others]
        return "  ".join([f"{first[0]:<{first[1]}}", *right]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return [*map(line, header), rule, *map(line, rows)]


def _row(name: str, figures: Mapping[str, Any]) -> list[str]:
    memory, loss = figures["memory"] or {}, figures["loss"]
    keys = ("held", "step", "loading", "training")
    quantize = figures["quantize_seconds"]
    return [
        name,
        "-" if quantize is None else seconds_text(quantize),
        seconds_text(figures["seconds"]["median"]),
        f"{figures['ratio']:.2f}",
        f"{figures['tokens_per_second']:,.0f}",
        *(f"{memory[key] / 1e6:,.0f}" if memory else "-" for key in keys),
        f"{loss['before']:.3f}",
        "-" if loss["after"] is None else f"{loss['after']:.3f}",
    ]


def seconds_text(value: float) -> str:
    """Three digits."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"
