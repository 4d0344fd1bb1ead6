"""Runs hqq's own HQQLinear on this library's operators, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hqqlora.autograd import linear
from hqqlora.hqq_layers import packed_weight
from hqqlora.optional_packages import needing
from hqqlora.state_values import META_DTYPES

Forward = Callable[[nn.Module, Tensor], Tensor]

# What the patch has replaced; empty without it. A class maps to the `forward` that it would
# have now, None if to none of its own.
_replaced_forward: dict[type[nn.Module], Forward | None] = {}
_replaced_set_backend: list[Any] = []


def patch_hqq() -> None:
    """Makes the HQQLinear of the hqq package run on this library's operators.

    Concerns every layer of that class, those that exist (inside a PEFT model or not) and those
    made later. Nothing is quantized again and no code is copied: the operators read the
    layer's `W_q` and `meta` where they are, `view_as_float` or not. Scales and zeros that hqq
    had quantized are dequantized at each call. ``HQQLinear.set_backend`` keeps deciding what
    runs where the operators cannot: x in float64, codes that are not packed, one scale for a
    whole matrix (channel_wise=False), a zero that is being trained.

    Layers whose own `forward` has been replaced (accelerate's hooks, hqq's
    `prepare_for_inference`) keep that. Calling this again changes nothing; `unpatch_hqq`
    undoes it.

    Raises:
        ImportError: hqq is not installed.
    """
    with needing("patch_hqq"):
        from hqq.core.quantize import HQQLinear
    if _replaced_set_backend:
        return
    _replaced_set_backend.append(HQQLinear.__dict__["set_backend"])
    HQQLinear.set_backend = classmethod(_set_backend)
    _replace_forward(HQQLinear)


def unpatch_hqq() -> None:
    """Gives hqq's HQQLinear back what `patch_hqq` has replaced, with the backend that
    `set_backend` has chosen in the meantime. Without a patch this does nothing."""
    if not _replaced_set_backend:
        return
    with needing("unpatch_hqq"):
        from hqq.core.quantize import HQQLinear

    HQQLinear.set_backend = _replaced_set_backend.pop()
    while _replaced_forward:
        cls, forward = _replaced_forward.popitem()
        if cls.__dict__.get("forward") is not _forward:
            continue  # somebody has replaced it since
        if forward is None:
            del cls.forward
        else:
            cls.forward = forward


def _set_backend(cls: type[nn.Module], backend: Any) -> None:
    """In the place of hqq's, which each new layer calls: lets it choose, then takes over."""
    _replaced_set_backend[0].__get__(None, cls)(backend)
    _replace_forward(cls)


def _replace_forward(cls: type[nn.Module]) -> None:
    forward = cls.__dict__.get("forward")
    if forward is not _forward:
        _replaced_forward[cls] = forward
        cls.forward = _forward


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    """y [..., out_features] in x's dtype for x [..., in_features]."""
    packed = packed_weight(layer) if x.dtype in META_DTYPES else None
    if packed is None:
        return _hqqs_forward(type(layer))(layer, x)
    bias = layer.bias
    if isinstance(bias, Tensor) and bias.dtype != x.dtype:
        bias = bias.float()
    return linear(x, packed, bias)  # type: ignore[arg-type]


def _hqqs_forward(cls: type[nn.Module]) -> Forward:
    for base in cls.__mro__:
        forward = _replaced_forward.get(base)
        if forward is not None:
            return forward
    chosen: Forward = getattr(cls, cls.backend.value)  # type: ignore[attr-defined]
    return chosen
