"""How hqq writes one value of a layer's metadata as a tensor, and the way back.

Integers are int32, booleans uint8, the shape int64 [2], strings and dtypes ("torch.uint8")
their ASCII codes. Plain Python values, as older checkpoints have them, are read too. Nothing
that is read is ever evaluated: dtypes come from a table. What is not a value of the kind asked
for raises ValueError.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

META_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_DTYPES: dict[str, torch.dtype] = {
    str(dtype): dtype for dtype in (*META_DTYPES, torch.uint8, torch.int32)
}
_LONGEST = 1000  # characters of a text, or sides of a shape; a file can claim any number


def encode(value: Any) -> Tensor:
    """hqq's tensor for one value. The device is named, for whoever has changed the default."""
    cpu = torch.device("cpu")
    if isinstance(value, torch.Size):
        return torch.tensor(list(value), dtype=torch.int64, device=cpu)
    if isinstance(value, bool):
        return torch.tensor(int(value), dtype=torch.uint8, device=cpu)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32, device=cpu)
    return torch.tensor(list(str(value).encode("ascii")), dtype=torch.uint8, device=cpu)


def read_number(value: Any) -> int | float:
    """A number, of a tensor with one element."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_meta:
            raise ValueError(f"a number is stored as a tensor {list(value.shape)}")
        value = value.item()
    if not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is not a number")
    return value


def read_boolean(value: Any) -> bool:
    """Any number but 0 is true."""
    return bool(read_number(value))


def read_shape(value: Any) -> tuple[int, int]:
    """(out_features, in_features), both positive."""
    if isinstance(value, Tensor):
        if value.is_meta or value.numel() > _LONGEST:
            raise ValueError(f"the shape is stored as a tensor {list(value.shape)}")
        value = value.tolist()
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"shape {value!r} is not (out_features, in_features)")
    sides = [read_number(side) for side in value]
    if any(side in (math.inf, -math.inf) or int(side) != side for side in sides):
        raise ValueError(f"shape {value!r} is not of whole numbers")
    out_features, in_features = map(int, sides)
    if out_features < 1 or in_features < 1:
        raise ValueError(f"shape {value!r} is not positive")
    return out_features, in_features


def read_text(value: Any) -> str:
    """A text, of a tensor with its ASCII codes."""
    if isinstance(value, Tensor):
        if (
            value.dim() != 1
            or value.dtype != torch.uint8
            or value.is_meta
            or value.numel() > _LONGEST
        ):
            raise ValueError(f"a string is stored as {value.dtype} {list(value.shape)}")
        return bytes(value.tolist()).decode("ascii", errors="replace")
    return str(value)


def read_dtype(key: str, value: Any) -> torch.dtype:
    """The dtype of that name; `key` is for the error."""
    if isinstance(value, torch.dtype):
        return value
    text = read_text(value)
    if text not in _DTYPES:
        raise ValueError(f"{key} {text!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[text]
