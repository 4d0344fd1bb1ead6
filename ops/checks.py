"""The checks of the ops' arguments for tensors without data.

They are those of the native side (arguments.h, adapter.h), with the same words, so that a
mistake is reported while tracing as it is when running. Sizes may be symbolic. Each raises
RuntimeError.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .weight import (
    BIT_WIDTHS,
    SLOTS_PER_WORD,
    is_planes,
    meta_shape,
    packed_shape,
    planes_fit,
    planes_shape,
    word_dtype,
)

FLOATING = (torch.float32, torch.float16, torch.bfloat16)
MAX_ITERS = 10000
INT64_MAX = 2**63 - 1


def check(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """RuntimeError with the message unless the condition, maybe symbolic, holds."""
    torch._check(  # type: ignore[no-untyped-call]
        condition, lambda: "hqqlora: " + message()
    )


def name_of(dtype: torch.dtype) -> str:
    """Python's name of a dtype, without "torch."."""
    return str(dtype).removeprefix("torch.")


def shape_of(tensor: Tensor) -> str:
    """The shape as a message shows it."""
    return str(list(tensor.shape))


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """All tensors of a call must be where x is."""
    check(
        tensor.device == device,
        lambda: f"{name} must be on {device}, got a tensor on {tensor.device}",
    )


def check_floating(name: str, dtype: torch.dtype) -> None:
    """The three dtypes that the kernels know."""
    check(
        dtype in FLOATING,
        lambda: f"{name} must be float32, float16 or bfloat16, got {name_of(dtype)}",
    )


def check_dtype_beside(name: str, tensor: Tensor, x_name: str, x: Tensor) -> None:
    """What is multiplied with x, or dy, or added to the product: float32 or x's dtype."""
    check(
        tensor.dtype in (torch.float32, x.dtype),
        lambda: (
            f"{name} must be float32 or {name_of(x.dtype)} as {x_name}, got "
            f"{name_of(tensor.dtype)}"
        ),
    )


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Packed weights are read as they lie."""
    check(
        tensor.is_contiguous(),
        lambda: (
            f"{name} must be contiguous, got shape {shape_of(tensor)} and strides "
            f"{list(tensor.stride())}"
        ),
    )


def check_rows(name: str, tensor: Tensor, width: int, width_name: str) -> None:
    """x or dy: [..., width]."""
    check_floating(name, tensor.dtype)
    check(
        tensor.dim() >= 1 and tensor.shape[-1] == width,
        lambda: (
            f"{name} must have a last dimension of {width_name} = {width}, got shape "
            f"{shape_of(tensor)}"
        ),
    )


def check_format(
    out_features: int, in_features: int, nbits: int, group_size: int, axis: int
) -> None:
    """Numbers that describe a weight: see `PackedWeight`."""
    check(nbits in SLOTS_PER_WORD, lambda: f"nbits must be {BIT_WIDTHS}, got {nbits}")
    check(axis in (0, 1), lambda: f"axis must be 0 or 1, got {axis}")
    check(
        out_features >= 0 and in_features >= 0,
        lambda: (
            f"out_features and in_features must not be negative, got {out_features} and "
            f"{in_features}"
        ),
    )
    check(
        out_features * in_features <= INT64_MAX,
        lambda: (
            f"out_features * in_features = {out_features} * {in_features} does not fit in 64 "
            f"bits"
        ),
    )
    check(group_size > 0, lambda: f"group_size must be positive, got {group_size}")
    check(
        out_features * in_features % group_size == 0,
        lambda: (
            f"group_size {group_size} does not divide out_features * in_features = "
            f"{out_features} * {in_features}"
        ),
    )


def check_quantize_options(
    solver: int, iters: int, lp_norm: float, beta: float, kappa: float
) -> None:
    """How to quantize: see `Solver`."""
    check(
        0 <= solver <= 2,
        lambda: f"solver must be 0 (default), 1 (reference) or 2 (minmax), got {solver}",
    )
    check(0 <= iters <= 2**31 - 1, lambda: f"iters must be 0 to 2147483647, got {iters}")
    # The rest is found, and said, by the C library, which has the numbers as float32.
    lp_norm, beta, kappa = (ctypes.c_float(value).value for value in (lp_norm, beta, kappa))
    check(
        1 <= iters <= MAX_ITERS,
        lambda: f"options.iters is {iters}; expected 1 to {MAX_ITERS}",
    )
    check(
        0 < lp_norm <= 1,
        lambda: f"options.lp_norm is {lp_norm:g}; expected 0 < lp_norm <= 1",
    )
    for name, value in (("beta", beta), ("kappa", kappa)):
        check(
            0 < value < math.inf,
            lambda name=name, value=value: (  # type: ignore[misc]
                f"options.{name} is {value:g}; expected a finite value above 0"
            ),
        )


def check_importance(
    importance: Tensor, solver: int, in_features: int, device: torch.device
) -> None:
    """How much each column of a weight to quantize counts."""
    check_device("importance", importance, device)
    check(
        importance.dtype == torch.float32,
        lambda: f"importance must be float32, got {name_of(importance.dtype)}",
    )
    check(
        tuple(importance.shape) == (in_features,),
        lambda: (
            f"importance must have shape [in_features] = [{in_features}], got "
            f"{shape_of(importance)}"
        ),
    )
    check(
        solver == 0,
        lambda: f"options.importance needs the default solver (0); options.solver is {solver}",
    )


def check_planes(
    name: str, out_features: int, in_features: int, nbits: int, group_size: int, axis: int
) -> None:
    """That 3 bits in planes, which `name` is or is to be, fit the weight."""
    rows = out_features * in_features // group_size if axis == 1 else group_size
    check(
        planes_fit(out_features, in_features, nbits, group_size, axis),
        lambda: (
            f"{name} is 3 bits in planes, for which 8 must divide out_features = "
            f"{out_features} and {'the number of groups' if axis == 1 else 'group_size'} = "
            f"{rows}; int32 words hold any weight"
        ),
    )


def check_packed(
    W_q: Tensor,
    out_features: int,
    in_features: int,
    nbits: int,
    group_size: int,
    axis: int,
    device: torch.device,
    experts: int | None = None,
) -> None:
    """The codes alone: see `PackedWeight`."""
    weight = (out_features, in_features, nbits, group_size, axis)
    check_format(*weight)
    expected = word_dtype(nbits)
    check_device("W_q", W_q, device)
    planes = is_planes(W_q, nbits)
    check(
        planes or W_q.dtype == expected,
        lambda: (
            f"W_q must be {name_of(expected)}{', or uint8 in planes,' if nbits == 3 else ''} "
            f"for nbits = {nbits}, got {name_of(W_q.dtype)}"
        ),
    )
    if planes:
        check_planes("W_q", *weight)
    words = math.prod(planes_shape(*weight) if planes else packed_shape(*weight))
    of_experts = "" if experts is None else f" for each of {experts} experts"
    check(
        W_q.numel() == words * (1 if experts is None else experts),
        lambda: (
            f"W_q must have {words} elements{of_experts} for out_features = {out_features}, "
            f"in_features = {in_features}, nbits = {nbits}, group_size = {group_size}, axis = "
            f"{axis}{', in planes' if planes else ''}, got shape {shape_of(W_q)}"
        ),
    )
    check_contiguous("W_q", W_q)


def check_weight(
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    out_features: int,
    in_features: int,
    nbits: int,
    group_size: int,
    axis: int,
    device: torch.device,
    experts: int | None = None,
) -> None:
    """A packed weight on one device: see `PackedWeight`; or those of several experts."""
    stacked = 1 if experts is None else experts
    of_experts = "" if experts is None else f" for each of {experts} experts"
    weight = (out_features, in_features, nbits, group_size, axis)
    check_packed(W_q, *weight, device, experts)
    groups = math.prod(meta_shape(out_features, in_features, group_size, axis))
    check_floating("scale", scale.dtype)
    check(
        zero.dtype == scale.dtype,
        lambda: (
            f"zero must have the dtype of scale, {name_of(scale.dtype)}, got "
            f"{name_of(zero.dtype)}"
        ),
    )
    for name, meta in (("scale", scale), ("zero", zero)):
        check_device(name, meta, device)
        check(
            meta.numel() == groups * stacked,
            lambda name=name, meta=meta: (  # type: ignore[misc]
                f"{name} must have one element for each of the {groups} groups{of_experts}, "
                f"got shape {shape_of(meta)}"
            ),
        )
        check_contiguous(name, meta)


def check_bias(bias: Tensor | None, out_features: int, x: Tensor) -> None:
    """bias [N], float32 or x's dtype."""
    if bias is None:
        return
    check_device("bias", bias, x.device)
    check_dtype_beside("bias", bias, "x", x)
    check(
        bias.dim() == 1 and bias.shape[0] == out_features,
        lambda: f"bias must have shape [{out_features}], got {shape_of(bias)}",
    )


def check_routing(offsets: Tensor, x_name: str, x: Tensor) -> int:
    """Which rows of x [M,width], or dy, belong to which expert: offsets int64 [E + 1] on the
    CPU. Returns E. What the offsets are is seen when the op runs."""
    check(x.dim() == 2, lambda: f"{x_name} must have two dimensions, got shape {shape_of(x)}")
    check(
        offsets.device.type == "cpu" or offsets.device == x.device == torch.device("meta"),
        lambda: f"offsets must be on cpu, got a tensor on {offsets.device}",
    )
    check(
        offsets.dtype == torch.int64
        and offsets.dim() == 1
        and offsets.shape[0] >= 2
        and offsets.is_contiguous(),
        lambda: (
            f"offsets must be a contiguous int64 tensor of shape [experts + 1], got "
            f"{name_of(offsets.dtype)} of shape {shape_of(offsets)}"
        ),
    )
    return offsets.shape[0] - 1


def rows_of(tensor: Tensor) -> int:
    """M: the product of all dimensions but the last."""
    return math.prod(tensor.shape[:-1])
