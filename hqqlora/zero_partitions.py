"""Parameters that DeepSpeed's ZeRO-3 has partitioned: in the module stands an empty tensor.

ZeRO-3 cuts each parameter up over the ranks, keeps the rank's part beside it, and leaves the
parameter itself without elements until it is gathered. What the whole one was it notes on it
(`ds_id`, `ds_shape`). A state_dict of such a module has the same empty placeholders: DeepSpeed
saves and loads the parts itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def is_zero_parameter(parameter: Tensor | None) -> bool:
    """Whether ZeRO-3 looks after this parameter, gathered or not."""
    return hasattr(parameter, "ds_id") and hasattr(parameter, "ds_shape")


def is_partitioned(parameter: Tensor | None) -> bool:
    """Whether ZeRO-3 has left an empty placeholder of this parameter."""
    if parameter is None or not is_zero_parameter(parameter):
        return False
    return parameter.numel() == 0 and whole_shape(parameter).count(0) == 0


def check_replaceable(
    parameter: Tensor | None, name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Raises ValueError if ZeRO-3 looks after a parameter: it would not know of another."""
    if is_zero_parameter(parameter):
        raise ValueError(
            f"{name} of a layer under DeepSpeed's ZeRO-3 cannot become another tensor, {dtype} "
            f"{list(shape)}: load this checkpoint before deepspeed.initialize"
        )


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, when it is whole."""
    noted: Any = getattr(parameter, "ds_shape", parameter.shape)
    return tuple(noted)


def partitioned_of(
    parameters: Mapping[str, Tensor | None], state: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The partitioned ones among a module's parameters that a state_dict has something for."""
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name in state and parameter is not None and is_partitioned(parameter)
    }


def full_for_partitioned(
    partitioned: Mapping[str, Tensor], state: Mapping[str, Any], layer: str
) -> str:
    """What to say where a state_dict has more than placeholders for partitioned parameters, or
    "" if it has not."""
    full = [
        f"{name} is {list(state[name].shape)}"
        for name, parameter in partitioned.items()
        if state[name].shape != parameter.shape
    ]
    if not full:
        return ""
    return (
        f"{layer}: {', '.join(full)}, but DeepSpeed's ZeRO-3 has partitioned the layer's: load "
        f"within deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)"
    )


def stand_in(parameter: Tensor) -> Tensor:
    """A tensor of a partitioned parameter's whole shape and dtype that takes no memory, for
    checks of both. It has no meaning beyond them."""
    return parameter.detach().new_zeros(()).expand(whole_shape(parameter))
