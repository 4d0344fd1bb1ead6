"""Keeping W_q a tensor of integers in versions of transformers 5 that convert all tensors."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers.integrations.accelerate import accelerate_disk_offload

from hqqlora.linear import HQQLinear


def keep_integers(model: Any) -> None:
    """Before loading: excepts W_q from the modules that are kept in float32."""
    plan = getattr(model, "dtype_plan", None)
    if plan:  # later versions have no such attribute
        model.dtype_plan = {
            pattern + r"(?!.{0,}\.W_q$)": dtype for pattern, dtype in plan.items()
        }


def refuse_converted(model: nn.Module) -> None:
    """After loading: ValueError if a layer is offloaded to the disk as what is not integers."""
    if "dtype" not in inspect.signature(accelerate_disk_offload).parameters:
        return  # each tensor keeps its own dtype
    for name, layer in model.named_modules():
        if isinstance(layer, HQQLinear) and layer.W_q.is_meta:
            raise ValueError(
                f"{name}: this version of transformers cannot offload a quantized checkpoint "
                f"to the disk, as it converts the codes; use a newer one"
            )
