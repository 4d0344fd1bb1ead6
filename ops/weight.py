"""A frozen HQQ weight as a value: what it is made of and the shapes of its parts."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PackedWeight", "Solver", "meta_shape", "packed_shape", "planes_fit", "planes_shape"]

# Bits of a code -> codes in a word: a byte, or an int32 with ten codes for 3 bits. These are
# the widths that there are (as in kernels/format.h).
SLOTS_PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
BIT_WIDTHS = " or ".join(", ".join(map(str, SLOTS_PER_WORD)).rsplit(", ", 1))
"""As messages say it: 8, 4, 3, 2 or 1."""


def word_dtype(nbits: int) -> torch.dtype:
    """The dtype of hqq's packed words: int32 for 3 bits, otherwise uint8."""
    return torch.uint8 if nbits * SLOTS_PER_WORD[nbits] == 8 else torch.int32


def is_planes(W_q: Tensor, nbits: int) -> bool:
    """Whether a weight's codes are in planes: that is what uint8 means at 3 bits."""
    return nbits == 3 and W_q.dtype == torch.uint8


class Solver(IntEnum):
    """How `torch.ops.hqqlora.quantize` finds codes, scales and zeros."""

    DEFAULT = 0
    """Range search, then least squares on scale and zero."""
    REFERENCE = 1
    """What hqq 0.2.8 computes on a CPU, step by step."""
    MINMAX = 2
    """The range of each group alone (hqq's ``optimize=False``)."""


class PackedWeight(NamedTuple):
    """A quantized weight ``W [out_features, in_features] = (q - zero) * scale``.

    The order is that of the ops, which are called as::

        torch.ops.hqqlora.linear(x, *weight[:3], bias, *weight[3:])
    """

    W_q: Tensor
    """The packed codes, contiguous: uint8, or int32 for 3 bits, of shape `packed_shape`; or
    3 bits in planes, uint8 of shape `planes_shape`."""
    scale: Tensor
    """float32, float16 or bfloat16; shape `meta_shape`; contiguous."""
    zero: Tensor
    """Like `scale`."""
    out_features: int
    in_features: int
    nbits: int
    """8, 4, 3, 2 or 1."""
    group_size: int
    """Elements that share a scale and a zero; divides out_features * in_features."""
    axis: int
    """1: a group runs along a row of W; 0: down a column."""


def _groups(out_features: int, in_features: int, group_size: int) -> int:
    elements = out_features * in_features
    if out_features < 0 or in_features < 0 or group_size <= 0 or elements % group_size:
        raise ValueError(
            f"group_size {group_size} does not divide out_features * in_features = "
            f"{out_features} * {in_features}"
        )
    return elements // group_size


def packed_shape(
    out_features: int, in_features: int, nbits: int, group_size: int, axis: int
) -> tuple[int, int]:
    """The shape of ``W_q`` in hqq's words: ``[ceil(N*K/G / per), G]`` for axis 1, ``[ceil(G /
    per), N*K/G]`` for axis 0, with ``per`` codes in a word (8 / nbits, or 10 for 3 bits).

        >>> packed_shape(out_features=4096, in_features=1024, nbits=4, group_size=64, axis=1)
        (32768, 64)

    N is out_features, K in_features and G group_size. Raises ValueError where no such weight
    exists.
    """
    if nbits not in SLOTS_PER_WORD:
        raise ValueError(f"nbits must be {BIT_WIDTHS}, got {nbits}")
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 or 1, got {axis}")
    groups = _groups(out_features, in_features, group_size)
    rows, columns = (groups, group_size) if axis == 1 else (group_size, groups)
    words = -(-rows // SLOTS_PER_WORD[nbits]) * columns
    return (words // columns if columns else 0), columns


def planes_fit(
    out_features: int, in_features: int, nbits: int, group_size: int, axis: int
) -> bool:
    """Whether a weight may be in planes (see `planes_shape`): it has 3 bits (`nbits`), and 8
    divides out_features and the number of groups, out_features * in_features / group_size
    (axis 1), or group_size (axis 0).

    Raises ValueError where no such weight exists.
    """
    groups = _groups(out_features, in_features, group_size)
    rows = groups if axis == 1 else group_size
    return nbits == 3 and out_features % 8 == 0 and rows % 8 == 0


def planes_shape(
    out_features: int, in_features: int, nbits: int, group_size: int, axis: int
) -> tuple[int, int]:
    """The shape of ``W_q`` for 3 bits in planes, exactly 3 bits a weight where hqq's words take
    3.2: ``[3/8 * N*K/G, G]`` for axis 1, ``[3/8 * G, N*K/G]`` for axis 0, uint8. The first
    two thirds of the rows are the upper two bits of the codes as hqq packs 2 bits, the last
    third the lowest bit as hqq packs 1 bit.

        >>> planes_shape(out_features=4096, in_features=1024, nbits=3, group_size=64, axis=1)
        (24576, 64)

    Raises ValueError where planes do not fit (see `planes_fit`).
    """
    if not planes_fit(out_features, in_features, nbits, group_size, axis):
        raise ValueError(
            f"a [{out_features}, {in_features}] weight of {nbits} bits in groups of "
            f"{group_size} along axis {axis} cannot be in planes"
        )
    groups = _groups(out_features, in_features, group_size)
    return (groups // 8 * 3, group_size) if axis == 1 else (group_size // 8 * 3, groups)


def meta_shape(
    out_features: int, in_features: int, group_size: int, axis: int
) -> tuple[int, int]:
    """The shape of ``scale`` and ``zero``: ``[N*K/G, 1]`` for axis 1, ``[1, N*K/G]`` for
    axis 0, where N is out_features, K in_features and G group_size.

        >>> meta_shape(out_features=4096, in_features=1024, group_size=64, axis=1)
        (65536, 1)

    Raises ValueError where no such weight exists.
    """
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 or 1, got {axis}")
    groups = _groups(out_features, in_features, group_size)
    return (groups, 1) if axis == 1 else (1, groups)
