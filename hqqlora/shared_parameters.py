"""Trained parameters that several ranks share: DTensors of FSDP2 and of tensor parallelism."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from hqqlora.zero_partitions import is_partitioned


def is_dtensor(tensor: Tensor) -> bool:
    """Without importing what takes a second, in programs that have none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_shared_out(model: nn.Module) -> bool:
    """Whether any parameter that learns is a DTensor."""
    return any(is_dtensor(p) for p in model.parameters() if p.requires_grad)


def whole_tensor(tensor: Tensor, name: str) -> Tensor:
    """`tensor`, put together from all ranks if it is a DTensor: they call this together.

    Raises:
        ValueError: DeepSpeed's ZeRO-3 has partitioned it.
    """
    if is_partitioned(tensor):
        raise ValueError(
            f"{name} is partitioned by DeepSpeed's ZeRO-3: save within "
            f"deepspeed.zero.GatheredParameters(hqqlora.lora_parameters(model))"
        )
    shared: Any = tensor
    return shared.full_tensor() if is_dtensor(tensor) else tensor


def copy_whole(parameter: Tensor, value: Tensor) -> None:
    """Copies into a parameter, be it a DTensor, the whole `value`, which each rank has."""
    if not is_dtensor(parameter):
        parameter.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    shared: Any = parameter
    local = value.to(parameter.device, parameter.dtype)
    parameter.copy_(
        distribute_tensor(local, shared.device_mesh, shared.placements, src_data_rank=None)
    )
