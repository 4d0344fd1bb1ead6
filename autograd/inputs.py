"""What happens to the inputs of a product before it: the weight is seen to be frozen, and x is
cast under autocast, once for all layers that take it.

q, k and v of an attention, and gate and up of an MLP, are called with the same tensor. Cast by
each for itself, it would be kept three times, or twice, until the backward pass.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..ops import PackedWeight


def check_frozen(weight: PackedWeight) -> None:
    """Raises ValueError if scale or zero requires a gradient, which they would not get."""
    if weight.scale.requires_grad or weight.zero.requires_grad:
        raise ValueError(
            "the scale and zero of a quantized weight are frozen, but one of them requires a "
            "gradient: call requires_grad_(False) on it"
        )


def autocast_input(x: Tensor) -> Tensor:
    """x as torch.autocast, where it is on, has a linear layer take it."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return cast_input(x, torch.get_autocast_dtype(device))


def bias_for(x: Tensor, bias: Tensor | None) -> Tensor | None:
    """Under autocast the bias goes with x. A float32 one may stay: the kernels add it before
    they round."""
    if bias is None or bias.dtype in (torch.float32, x.dtype):
        return bias
    return bias.to(x.dtype) if torch.is_autocast_enabled(x.device.type) else bias


def transforms_active() -> bool:
    """Whether torch.func, or forward-mode differentiation, is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _LastCast(threading.local):
    """The last cast of this thread. Nothing is kept alive: the result lives as long as a layer
    has saved it, which is just when there is something to share."""

    source: Callable[[], Tensor | None] = staticmethod(lambda: None)
    result: Callable[[], Tensor | None] = staticmethod(lambda: None)
    version = -1


_last = _LastCast()


def cast_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, the same tensor as last time where that is still in use and x is still
    what it was. Gradients flow through it."""
    if x.dtype == dtype or torch.compiler.is_compiling() or x.is_inference():
        return x.to(dtype)
    known = _last.result() if _last.source() is x and _last.version == x._version else None
    if (
        known is not None
        and known.dtype == dtype
        and known.requires_grad == (x.requires_grad and torch.is_grad_enabled())
    ):
        return known
    result = x.to(dtype)
    _last.source, _last.result = weakref.ref(x), weakref.ref(result)
    _last.version = x._version
    return result
