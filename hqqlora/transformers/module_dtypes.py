"""Which dtype transformers gives to each module of a model."""

from __future__ import annotations

import re
from typing import Any

import torch


class ModuleDtypes:
    """`dtype`, but float32 for the modules that a model keeps so (T5's "wo" in float16)."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        """Asks the model for its exceptions."""
        self._dtype = dtype
        self._exceptions = {
            re.compile(pattern.replace("*", ".*")): other
            for pattern, other in _dtype_plan(model, dtype).items()
        }

    def of(self, name: str) -> torch.dtype:
        """The dtype of the weight of the module `name`."""
        for pattern, dtype in self._exceptions.items():
            if pattern.search(f"{name}.weight"):
                return dtype
        return self._dtype


def _dtype_plan(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    ask = getattr(model, "_get_dtype_plan", None)
    plan = ask(dtype) if ask is not None else getattr(model, "dtype_plan", None)
    return plan or {}
