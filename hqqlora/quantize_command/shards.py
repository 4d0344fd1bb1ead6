"""Dividing what is written into files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hqqlora.command.checkpoint_folder import SINGLE
from hqqlora.command.safetensors_file import total_bytes
from hqqlora.quantize_command.step import Step


def into_shards(steps: Sequence[Step], largest: int) -> dict[str, list[Step]]:
    """File names, as `save_pretrained` gives them, and what is in each: in order, and of at
    most `largest` bytes unless one layer alone has more. A layer is never divided."""
    shards: list[list[Step]] = []
    size = 0
    for step in steps:
        own = total_bytes(step.results().values())
        if not shards or size + own > largest:
            shards.append([])
            size = 0
        shards[-1].append(step)
        size += own
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = len(shards)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def index_of(shards: Mapping[str, Sequence[Step]]) -> dict[str, Any] | None:
    """What stands in the index; None: one file needs none."""
    if len(shards) == 1:
        return None
    places: dict[str, str] = {}
    size = 0
    for file, steps in shards.items():
        for step in steps:
            results = step.results()
            places.update(dict.fromkeys(results, file))
            size += total_bytes(results.values())
    return {"metadata": {"total_size": size}, "weight_map": places}
