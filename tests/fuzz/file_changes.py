"""Random changes of files: of bytes, of the values in JSON, safetensors headers and pickles."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from typing import Any

import torch

NUMBERS = [0, 1, 2, 3, 7, 8, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**70, 10**400, 0.5, 1e308, float("nan")),
    *(float("inf"), "", "4", "../../x", "torch.float16", "x" * 5000, [], {}, [[]], [1, [2]]),
    *({"a": {"b": None}}, [None], "__import__('os').abort()"),
]


def change_bytes(content: bytes, generator: random.Random) -> bytes:
    """Some bytes, numbers or pieces; most often near the beginning, where headers are."""
    data = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 4, 16))):
        reach = len(data) if generator.random() < 0.3 else min(len(data), 400)
        if reach < 9:
            break
        at = generator.randrange(reach - 8)
        kind = generator.randrange(6)
        if kind == 0:
            data[at] = generator.randrange(256)
        elif kind == 1:
            data[at] ^= 1 << generator.randrange(8)
        elif kind == 2:
            data[at : at + 8] = struct.pack("<Q", generator.choice(NUMBERS))
        elif kind == 3:
            data[at : at + 4] = struct.pack("<I", generator.choice(NUMBERS) & 0xFFFFFFFF)
        elif kind == 4:
            del data[at : at + generator.randrange(1, 40)]
        else:
            data[at:at] = data[at : at + generator.randrange(1, 40)]
    if generator.random() < 0.1 and data:
        del data[generator.randrange(len(data)) :]
    return bytes(data)


def change_value(value: Any, generator: random.Random) -> Any:
    """`value` with something in it replaced, removed or added."""
    if isinstance(value, dict) and value and generator.random() < 0.85:
        key = generator.choice(list(value))
        kind = generator.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return {**value, generator.choice((key, "x", "", "../x")): generator.choice(VALUES)}
        return {**value, key: change_value(value[key], generator)}
    if isinstance(value, (list, tuple)) and value and generator.random() < 0.8:
        at = generator.randrange(len(value))
        changed = change_value(value[at], generator)
        return (
            type(value)([*value[:at], changed, *value[at + 1 :]])
            if type(value) in (list, tuple)
            else [changed]
        )
    if isinstance(value, torch.Tensor) and generator.random() < 0.8:
        return change_tensor(value, generator)
    return generator.choice(VALUES)


def change_tensor(tensor: torch.Tensor, generator: random.Random) -> torch.Tensor:
    return generator.choice(
        [
            lambda: tensor.flatten()[:-1],
            lambda: tensor[None],
            lambda: tensor.to(torch.float64),
            lambda: tensor.to(torch.int32),
            lambda: tensor.new_empty(0),
            lambda: tensor.new_zeros(()).expand(2**40),
            lambda: tensor.new_zeros(()).expand(tensor.shape),
            lambda: tensor.to("meta"),
            lambda: tensor.to(torch.complex64),
            lambda: tensor.to_sparse() if tensor.dim() else tensor,
            lambda: torch.full_like(tensor, 127),
            lambda: tensor.mT if tensor.dim() > 1 else tensor,
        ]
    )()


def change_json(content: bytes, generator: random.Random) -> bytes:
    value = json.loads(content)
    for _ in range(generator.choice((1, 1, 2))):
        value = change_value(value, generator)
    return json.dumps(value).encode()


def change_safetensors(content: bytes, generator: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = change_json(content[8 : 8 + length], generator)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def change_torch(content: bytes, generator: random.Random) -> bytes:
    """The objects, or the pickle's bytes in an archive that is sound otherwise."""
    if generator.random() < 0.6:
        value = change_value(torch.load(io.BytesIO(content), weights_only=True), generator)
        stream = io.BytesIO()
        torch.save(value, stream, _use_new_zipfile_serialization=generator.random() < 0.9)
        return stream.getvalue()
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(stream, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                data = change_bytes(data, generator)
            target.writestr(name, data)
    return stream.getvalue()
