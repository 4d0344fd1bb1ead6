"""What quantized layers a checkpoint has, from its files' headers and small values alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hqqlora.ops.weight import word_dtype
from hqqlora.state_encoding import (
    LAYER_KEYS,
    METADATA_KEYS,
    LayerMetadata,
    LayerState,
    decode_layer,
    fit_tensors,
)
from hqqlora.torch_files import read_torch

# A module that has one of these is a quantized layer, or what is left of one.
_SIGNS = frozenset(("W_q", "packing", "unpack_view_dtype", "meta"))
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class CheckpointLayer:
    """One quantized layer of a checkpoint. `W_q` and the others have shapes and dtypes as they
    are stored, and no data. `metadata` is None if the checkpoint leaves it to config.json."""

    W_q: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None
    metadata: LayerMetadata | None

    def checked(self, metadata: LayerMetadata, layer: str) -> None:
        """ValueError, naming the layer, if a tensor is not what `metadata` calls for."""
        if self.num_experts is not None:
            self._check_experts(metadata, layer)
            return
        state = LayerState(self.W_q, self.scale, self.zero, self.bias, metadata)
        fit_tensors(state, metadata, layer)
        for name in ("scale", "zero"):
            found = getattr(self, name)
            if tuple(found.shape) != metadata.meta_shape:
                raise ValueError(
                    f"{layer}: {name} is {list(found.shape)}, not {list(metadata.meta_shape)}"
                )

    @property
    def num_experts(self) -> int | None:
        """How many experts' weights are stacked; None: it is one weight."""
        return self.W_q.size(0) if self.W_q.dim() == 3 else None

    def _check_experts(self, metadata: LayerMetadata, layer: str) -> None:
        counts = [tensor.shape[:1] for tensor in (self.W_q, self.scale, self.zero)]
        if len(set(counts)) > 1 or self.num_experts == 0 or self.scale.dim() != 3:
            shapes = [list(tensor.shape) for tensor in (self.W_q, self.scale, self.zero)]
            raise ValueError(
                f"{layer}: W_q, scale and zero are {shapes}, not those of as many experts"
            )
        first = replace(self, W_q=self.W_q[0], scale=self.scale[0], zero=self.zero[0])
        first.checked(metadata, layer)

    @property
    def is_float_view(self) -> bool:
        """Whether W_q is stored as floats (view_as_float)."""
        return self.W_q.is_floating_point()


@dataclass(frozen=True)
class CheckpointContents:
    """The quantized layers under the checkpoint's names, and the keys of all other tensors."""

    layers: Mapping[str, CheckpointLayer]
    other_keys: frozenset[str]


def contents_of(files: Sequence[str]) -> CheckpointContents:
    """What is in the files of a checkpoint, safetensors or PyTorch's.

    Raises:
        ValueError: a file is damaged, or a layer is incomplete or inconsistent; names it.
    """
    states: dict[str, dict[str, Any]] = {}
    others: set[str] = set()
    for file in files:
        for key, value in _read(file):
            module, _, name = key.rpartition(".")
            if name in LAYER_KEYS:
                states.setdefault(module, {})[name] = value
            else:
                others.add(key)
    layers = {name: state for name, state in states.items() if _SIGNS & state.keys()}
    others.update(
        f"{module}.{name}"
        for module, state in states.items()
        if module not in layers
        for name in state
    )
    described = {name: _describe(name, state) for name, state in layers.items()}
    return CheckpointContents(described, frozenset(others))


def _describe(name: str, state: Mapping[str, Any]) -> CheckpointLayer:
    """Reads the layer `name`: `state` has hqq's keys, in any of hqq's forms."""
    decoded = decode_layer(state, name)
    layer = CheckpointLayer(
        decoded.W_q.to("meta"),
        decoded.scale.to("meta"),
        decoded.zero.to("meta"),
        None if decoded.bias is None else decoded.bias.to("meta"),
        decoded.metadata,
    )
    if decoded.metadata is not None:
        layer.checked(decoded.metadata, name)
    return layer


def _read(file: str) -> Iterator[tuple[str, Tensor]]:
    """The keys of a file, with tensors that have data only where they are small metadata."""
    if not os.fspath(file).endswith(".safetensors"):
        state = read_torch(file, mmap=True)
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise ValueError(f"{file} holds no named tensors")
        yield from state.items()
        return
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                if key.rpartition(".")[2] in METADATA_KEYS:
                    yield key, opened.get_tensor(key)
                    continue
                found = opened.get_slice(key)
                dtype = _DTYPES.get(found.get_dtype(), torch.float64)
                yield key, torch.empty(found.get_shape(), dtype=dtype, device="meta")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def words_of(stored: Tensor, metadata: LayerMetadata) -> Tensor:
    """`W_q` as whole numbers."""
    if not stored.is_floating_point():
        return stored
    return stored.contiguous().view(word_dtype(metadata.settings.nbits))
