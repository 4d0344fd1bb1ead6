"""Whether a module may be read instead of called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_plain(module: nn.Module, kind: type[nn.Module], x: Tensor) -> bool:
    """Whether calling the module on x's device is `kind`'s forward and nothing else: no
    subclass with another, no hooks."""
    if (
        type(module).forward is not kind.forward
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return False
    return "forward" not in module.__dict__ or _is_idle(module, x)


def _is_idle(module: nn.Module, x: Tensor) -> bool:
    """Whether the forward that accelerate has put into the module only brings its input to
    where it is already: so it is in models spread over several devices."""
    hook: Any = module.__dict__.get("_hf_hook")
    if type(hook).__name__ != "AlignDevicesHook" or hook.offload:
        return False
    device = hook.execution_device
    return device is None or torch.device(device) == x.device
