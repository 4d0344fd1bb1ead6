"""How the ops work under torch.vmap.

With only x (or dy) batched, the batch is one more leading dimension of one call: `linear`,
`linear_dgrad`, and `lora_linear` without dropout. Anything else takes one call for each member
of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .library import OPS

InDims = tuple[int | None, ...]
Rule = Callable[..., tuple[Any, Any]]


def _one_by_one(
    op: Any, size: int, in_dims: InDims, arguments: tuple[Any, ...]
) -> tuple[Any, Any]:
    results = [
        op(
            *(
                a if dim is None else a.select(dim, i)
                for a, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for i in range(size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _only_rows(in_dims: InDims) -> bool:
    return in_dims[0] is not None and all(dim is None for dim in in_dims[1:])


def _rule(name: str) -> Rule:
    op = getattr(torch.ops.hqqlora, name)

    def rule(info: Any, in_dims: InDims, *arguments: Any) -> tuple[Any, Any]:
        return _one_by_one(op, info.batch_size, in_dims, arguments)

    def rows_rule(info: Any, in_dims: InDims, *arguments: Any) -> tuple[Any, Any]:
        if not _only_rows(in_dims):
            return rule(info, in_dims, *arguments)
        out: Tensor = op(arguments[0].movedim(in_dims[0], 0), *arguments[1:])
        return out, 0

    def lora_rule(info: Any, in_dims: InDims, *arguments: Any) -> tuple[Any, Any]:
        dropout = arguments[9]
        if not _only_rows(in_dims) or dropout > 0:  # one seed: one mask for all members
            return rule(info, in_dims, *arguments)
        y, xa = op(arguments[0].movedim(in_dims[0], 0), *arguments[1:])
        size = info.batch_size
        return (y, xa.reshape(size, xa.shape[0] // size, xa.shape[1])), (0, 0)

    rules = {"linear": rows_rule, "linear_dgrad": rows_rule, "lora_linear": lora_rule}
    return rules.get(name, rule)


def register() -> None:
    """Attach the rules to the ops."""
    for name in OPS:
        torch.library.register_vmap(f"hqqlora::{name}", _rule(name))
