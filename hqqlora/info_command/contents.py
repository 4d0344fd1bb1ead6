"""What a folder holds: quantized layers, dense tensors, an adapter. Headers and small values
are read, and of qmodel.pt what it maps; weights only when asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqqlora.adapter_files import CONFIG_FILE as ADAPTER_CONFIG
from hqqlora.adapter_files import read_config as read_adapter_config
from hqqlora.adapter_files import read_factors
from hqqlora.command.checkpoint_folder import find_folder, weight_files
from hqqlora.command.errors import UsageError, explaining
from hqqlora.command.safetensors_file import StoredTensor, read_header
from hqqlora.hqq_checkpoint import WEIGHTS_FILE, read_module_states
from hqqlora.linear import HQQLinear
from hqqlora.module_names import full_name
from hqqlora.state_encoding import (
    LAYER_KEYS,
    METADATA_KEYS,
    TENSOR_KEYS,
    LayerMetadata,
    decode_layer,
)


@dataclass(frozen=True)
class QuantizedLayer:
    """A quantized layer, or a projection of experts. `metadata` is None where the checkpoint
    does not say how the layer is quantized. `nbytes`: of codes, scales and zeros. `experts`:
    how many matrices are stacked; None: it is one matrix."""

    name: str
    metadata: LayerMetadata | None
    nbytes: int
    experts: int | None
    _state: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """[out_features, in_features], of experts [experts, out_features, in_features]."""
        m = self.metadata
        if m is None:
            return None
        matrix = (m.out_features, m.in_features)
        return matrix if self.experts is None else (self.experts, *matrix)

    @property
    def numel(self) -> int | None:
        """The number of weights."""
        return None if self.shape is None else math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float | None:
        """With scales and zeros."""
        return None if self.numel is None else 8 * self.nbytes / self.numel

    def dequantize(self, expert: int | None = None) -> Tensor:
        """The weight [out_features, in_features], of experts that of one, in float32, read now.

        Raises:
            ValueError: it is damaged; names the layer.
        """
        layer = HQQLinear(None, None, device="meta")  # which takes tensors as they are
        state = {
            key: _read(value, None if key in METADATA_KEYS else expert)
            for key, value in self._state.items()
        }
        try:
            layer.load_state_dict(state, assign=True)
            return layer.dequantize(torch.float32)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{self.name}: {error}") from error


@dataclass(frozen=True)
class DenseTensor:
    """A tensor that is not quantized; `note` says what a reader should know of it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    note: str


@dataclass(frozen=True)
class AdapterLayer:
    """A layer of an adapter."""

    name: str
    rank: int
    shape: tuple[int, int]
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Contents:
    """All of a folder. `kind`: "quantized model", "dense model" or "LoRA adapter"."""

    kind: str
    layers: tuple[QuantizedLayer, ...] = ()
    dense: tuple[DenseTensor, ...] = ()
    adapter: tuple[AdapterLayer, ...] = ()
    adapter_config: Mapping[str, Any] | None = None


def read_contents(folder: Path) -> Contents:
    """Looks into `folder`.

    Raises:
        UsageError: it holds none of the three, or a file is damaged; names it.
    """
    with explaining(f"cannot read {folder}"):
        if (folder / ADAPTER_CONFIG).is_file():
            return _adapter(folder)
        if (folder / WEIGHTS_FILE).is_file():
            return _of_modules(read_module_states(folder / WEIGHTS_FILE))
        folder = find_folder(str(folder))
        return _of_modules(_modules_of_files([folder / name for name in weight_files(folder)]))


def _modules_of_files(files: list[Path]) -> dict[str, dict[str, Any]]:
    """As hqq's own checkpoints are: the name of a module -> its tensors."""
    modules: dict[str, dict[str, Any]] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            module, _, key = name.rpartition(".")
            modules.setdefault(module, {})[key] = tensor
    return modules


def _of_modules(modules: Mapping[str, Mapping[str, Any]]) -> Contents:
    layers: list[QuantizedLayer] = []
    dense: list[DenseTensor] = []
    for module, state in modules.items():
        if "W_q" in state:
            layers.append(_layer(module, state))
        for key, tensor in state.items():
            if ("W_q" not in state or key == "bias") and isinstance(
                tensor, (Tensor, StoredTensor)
            ):
                name = full_name(module, key)
                shape = tuple(tensor.shape)
                note = _note(name, shape)
                dense.append(DenseTensor(name, tensor.dtype, shape, tensor.nbytes, note))
    kind = "quantized model" if layers else "dense model"
    return Contents(kind, tuple(layers), tuple(dense))


def _layer(name: str, state: Mapping[str, Any]) -> QuantizedLayer:
    kept = {key: value for key, value in state.items() if key in LAYER_KEYS}
    shown = {
        key: _shape_only(value) if key in TENSOR_KEYS else _read(value)
        for key, value in kept.items()
    }
    decoded = decode_layer(shown, name)
    nbytes = sum(tensor.nbytes for tensor in (decoded.W_q, decoded.scale, decoded.zero))
    experts = decoded.W_q.size(0) if decoded.W_q.dim() == 3 else None
    return QuantizedLayer(name, decoded.metadata, nbytes, experts, kept)


def _shape_only(value: Any) -> Any:
    if isinstance(value, StoredTensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value.to("meta") if isinstance(value, Tensor) else value


def _read(value: Any, index: int | None = None) -> Any:
    if isinstance(value, StoredTensor):
        return value.read() if index is None else value.read_index(index)
    return value if index is None else value[index]


def _note(name: str, shape: tuple[int, ...]) -> str:
    """Most weights of a mixture of experts are in its experts."""
    if name.endswith("bias"):
        return ""
    if "expert" in name and len(shape) == 3:
        return "experts in one 3-D tensor, not quantized"
    if "expert" in name and len(shape) == 2:
        return "an expert, not quantized"
    return ""


def _adapter(folder: Path) -> Contents:
    config = read_adapter_config(folder)
    layers = tuple(
        AdapterLayer(
            name,
            f.A.size(0),
            (f.B.size(0), f.A.size(1)),
            f.A.numel() + f.B.numel() + (0 if f.bias is None else f.bias.numel()),
            f.A.nbytes + f.B.nbytes + (0 if f.bias is None else f.bias.nbytes),
        )
        for name, f in read_factors(folder, config).items()
    )
    if not layers:
        raise UsageError(f"{folder} holds no adapter")
    return Contents("LoRA adapter", adapter=layers, adapter_config=config)
