"""How hqq writes a quantized layer's metadata into a state_dict, and the way back.

A layer's tensors `W_q`, `scale`, `zero` (and `bias`) stand beside sixteen small values. hqq
stores those as tensors, so that safetensors takes them (state_values.py). Older checkpoints
keep them as plain Python values, flat or in a nested dict `meta`. All three forms are read
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hqqlora.config import QuantSettings
from hqqlora.ops import meta_shape, packed_shape
from hqqlora.ops.weight import word_dtype
from hqqlora.planes import codes_layout
from hqqlora.state_values import (
    META_DTYPES,
    encode,
    read_boolean,
    read_dtype,
    read_number,
    read_shape,
    read_text,
)

TENSOR_KEYS = ("W_q", "scale", "zero", "bias")
METADATA_KEYS = (
    "nbits",
    "group_size",
    "shape",
    "axis",
    "packing",
    "unpack_view_dtype",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
)
# What old checkpoints may have besides: nested metadata, and quantized scales and zeros.
OLD_KEYS = (
    "meta",
    "zero_scale",
    "zero_q",
    "scale_q",
    "meta_zero",
    "meta_scale",
    "scale_quant_params",
    "zero_quant_params",
)
# All that may be stored of a layer.
LAYER_KEYS = (*TENSOR_KEYS, *METADATA_KEYS, *OLD_KEYS)

PACKING = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}

_BOOLEANS = (
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raises TypeError, naming the argument, for a dtype that the products do not take."""
    if dtype not in META_DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, not {dtype}")


@dataclass(frozen=True)
class LayerMetadata:
    """Everything about a quantized layer that is not one of its tensors."""

    settings: QuantSettings
    out_features: int
    in_features: int
    compute_dtype: torch.dtype

    @property
    def group_size(self) -> int:
        """The group size with None resolved."""
        return self.settings.group_size_for(self.out_features, self.in_features)

    @property
    def format(self) -> tuple[int, int, int, int, int]:
        """What a `PackedWeight` ends with."""
        s = self.settings
        return (self.out_features, self.in_features, s.nbits, self.group_size, s.axis)

    @property
    def packed_shape(self) -> tuple[int, int]:
        """The shape of `W_q` as whole numbers, in hqq's words."""
        return packed_shape(*self.format)

    def held(self, planes: bool) -> tuple[tuple[int, int], torch.dtype]:
        """Shape and dtype of `W_q` in a layer: in planes, where they fit, or in hqq's words."""
        return codes_layout(self.format, planes)

    @property
    def meta_shape(self) -> tuple[int, int]:
        """The shape of `scale` and of `zero`."""
        s = self.settings
        return meta_shape(self.out_features, self.in_features, self.group_size, s.axis)

    def check_float_view(self) -> None:
        """Raises ValueError where view_as_float cannot be: hqq reinterprets the words along a
        row of `W_q`, so that a row must hold whole floats."""
        width = self.packed_shape[1] * word_dtype(self.settings.nbits).itemsize
        if width % self.compute_dtype.itemsize:
            raise ValueError(
                f"view_as_float: a packed row of {width} bytes does not hold whole "
                f"{self.compute_dtype} values; leave view_as_float off for a "
                f"[{self.out_features}, {self.in_features}] weight"
            )

    def values(self) -> dict[str, Any]:
        """The metadata as hqq's plain Python values."""
        s = self.settings
        return {
            "nbits": s.nbits,
            "group_size": self.group_size,
            "shape": torch.Size((self.out_features, self.in_features)),
            "axis": s.axis,
            "packing": PACKING[s.nbits],
            "unpack_view_dtype": word_dtype(s.nbits),
            "view_as_float": s.view_as_float,
            "quant_scale": False,
            "quant_zero": False,
            "compute_dtype": self.compute_dtype,
            "offload_meta": False,
            "encoded_state_dict": True,
            "stores_quant_config": True,
            "channel_wise": True,
            "optimize": s.optimize,
            "round_zero": s.round_zero,
        }

    def encoded(self) -> dict[str, Tensor]:
        """The metadata as hqq's tensors: fresh ones, on the CPU."""
        return {key: encode(value) for key, value in self.values().items()}


@dataclass(frozen=True)
class LayerState:
    """A layer as a checkpoint has it. `metadata` is None if only the tensors were stored, for
    whoever already knows the rest."""

    W_q: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None
    metadata: LayerMetadata | None


def decode_layer(state: Mapping[str, Any], layer: str, solver: str = "default") -> LayerState:
    """Reads one layer: `state` has hqq's names without a prefix, in any of hqq's forms.

    Args:
        state: tensors and metadata, encoded, raw, or with a nested `meta`.
        layer: its name, for messages.
        solver: what a later requantization is to use; checkpoints do not say.

    Raises:
        ValueError: a value is missing, unknown, or does not fit the others.
    """
    values = dict(state)
    nested = values.pop("meta", None)
    if isinstance(nested, Mapping):
        values = {**nested, **values}
    bias = values.get("bias")
    W_q = values.get("W_q")
    scale, zero = scale_and_zero(values, layer)
    if not (isinstance(W_q, Tensor) and isinstance(scale, Tensor) and isinstance(zero, Tensor)):
        raise ValueError(f"{layer}: a quantized layer needs the tensors W_q, scale and zero")
    if "nbits" not in values and "shape" not in values:
        return LayerState(W_q, scale, zero, bias, None)
    metadata = _decode_metadata(values, layer, solver, scale.dtype)
    return LayerState(W_q, scale, zero, bias, metadata)


def fit_tensors(state: LayerState, metadata: LayerMetadata, layer: str) -> dict[str, Tensor]:
    """The tensors of `state` in the shapes and dtypes that `metadata` calls for: `W_q` as whole
    numbers [packed_shape], or in planes if it is so, `scale` and `zero` [meta_shape], `bias`
    [out_features].

    Raises:
        ValueError: a tensor has another shape (scale and zero: number of elements) or dtype, is
            not dense, or has no data where others have.
    """
    _check_dense(state, layer)
    words = word_dtype(metadata.settings.nbits)
    W_q = state.W_q.detach()
    if W_q.is_floating_point() and W_q.dim() > 0:
        width = W_q.size(-1) * W_q.element_size()
        if width % words.itemsize == 0:  # otherwise the comparison below tells
            W_q = W_q.contiguous().view(words)
    shape = metadata.packed_shape
    found = (tuple(W_q.shape), W_q.dtype)
    if found not in (metadata.held(planes=False), metadata.held(planes=True)):
        raise ValueError(
            f"{layer}: W_q is {state.W_q.dtype} {list(state.W_q.shape)}, but "
            f"{_describe(metadata)} needs {words} {list(shape)}"
        )
    tensors = {"W_q": W_q}
    shape = metadata.meta_shape
    for name, tensor in (("scale", state.scale), ("zero", state.zero)):
        if tensor.dtype not in META_DTYPES or tensor.numel() != shape[0] * shape[1]:
            raise ValueError(
                f"{layer}: {name} is {tensor.dtype} {list(tensor.shape)}, but "
                f"{_describe(metadata)} needs float32, float16 or bfloat16 {list(shape)}"
            )
        tensors[name] = tensor.detach().reshape(shape)
    dtype = torch.promote_types(tensors["scale"].dtype, tensors["zero"].dtype)
    tensors["scale"], tensors["zero"] = tensors["scale"].to(dtype), tensors["zero"].to(dtype)
    if state.bias is not None:
        if tuple(state.bias.shape) != (metadata.out_features,):
            raise ValueError(
                f"{layer}: bias is {list(state.bias.shape)}, not [{metadata.out_features}]"
            )
        tensors["bias"] = state.bias.detach()
    return tensors


def _check_dense(state: LayerState, layer: str) -> None:
    """What cannot be copied must not be found when half of the layer has been copied. All on
    the meta device is fine: a layer there takes that."""
    tensors = {"W_q": state.W_q, "scale": state.scale, "zero": state.zero}
    if state.bias is not None:
        tensors["bias"] = state.bias
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{layer}: {name} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided:
            raise ValueError(f"{layer}: {name} is a {tensor.layout} tensor, not a dense one")
    without_data = [name for name, tensor in tensors.items() if tensor.is_meta]
    if without_data and len(without_data) < len(tensors):
        raise ValueError(
            f"{layer}: {', '.join(without_data)} of the checkpoint is on the meta device and "
            f"has no data"
        )


def _describe(metadata: LayerMetadata) -> str:
    s = metadata.settings
    return (
        f"a [{metadata.out_features}, {metadata.in_features}] weight of {s.nbits} bits, "
        f"group_size {metadata.group_size}, axis {s.axis}"
    )


def _decode_metadata(
    values: Mapping[str, Any], layer: str, solver: str, default_dtype: torch.dtype
) -> LayerMetadata:
    for key in ("nbits", "shape", "axis"):
        if values.get(key) is None:
            raise ValueError(f"{layer}: the checkpoint says nothing about {key!r}")
    config: dict[str, Any] = {
        key: read_boolean(values[key]) for key in _BOOLEANS if key in values
    }
    # The tensors are dequantized by now if hqq had quantized them.
    for key in ("quant_scale", "quant_zero", "offload_meta", "encoded_state_dict"):
        config.pop(key, None)
    config.pop("stores_quant_config", None)
    group_size = values.get("group_size")
    try:
        settings = QuantSettings.parse(
            {
                **config,
                "nbits": read_number(values["nbits"]),
                "group_size": None if group_size is None else read_number(group_size),
                "axis": read_number(values["axis"]),
                "solver": solver,
            }
        )
        out_features, in_features = read_shape(values["shape"])
        settings.group_size_for(out_features, in_features)
        _check_packing(values, settings.nbits)
        compute_dtype = read_dtype("compute_dtype", values.get("compute_dtype", default_dtype))
        if compute_dtype not in META_DTYPES:
            raise ValueError(f"compute_dtype {compute_dtype} is not a floating-point dtype")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{layer}: {error}") from error
    return LayerMetadata(settings, out_features, in_features, compute_dtype)


def _check_packing(values: Mapping[str, Any], nbits: int) -> None:
    packing = values.get("packing")
    if packing is not None and read_text(packing) != PACKING[nbits]:
        raise ValueError(f"packing {read_text(packing)!r} does not fit nbits={nbits}")
    view = values.get("unpack_view_dtype")
    if view is not None and read_dtype("unpack_view_dtype", view) != word_dtype(nbits):
        raise ValueError(f"unpack_view_dtype {read_text(view)!r} does not fit nbits={nbits}")


def scale_and_zero(values: Mapping[str, Any], layer: str) -> tuple[Any, Any]:
    """Scale and zero of hqq's `meta`, also where hqq had quantized or stacked them; None for
    one that is not there.

    Raises:
        ValueError: a quantized scale or zero is not in hqq's form.
    """
    scale, zero = values.get("scale"), values.get("zero")
    stacked = values.get("zero_scale")
    if isinstance(stacked, Tensor) and stacked.dim() > 0 and stacked.size(0) == 2:
        if stacked.is_floating_point():
            zero, scale = stacked[0], stacked[1]
        else:
            zero = _dequantize_meta(stacked[0], values.get("meta_zero"), "zero", layer)
            scale = _dequantize_meta(stacked[1], values.get("meta_scale"), "scale", layer)
    if scale is None and "scale_q" in values:
        scale = _dequantize_meta(values["scale_q"], values.get("meta_scale"), "scale", layer)
    if zero is None and "zero_q" in values:
        zero = _dequantize_meta(values["zero_q"], values.get("meta_zero"), "zero", layer)
    return scale, zero


def _dequantize_meta(codes: Any, meta: Any, name: str, layer: str) -> Tensor:
    """(q - zero) * scale of a scale or zero that hqq had quantized; always to 8 bits. The steps
    are hqq's, in the dtype it takes them in, so that each rounds as it does there."""
    problem = f"{layer}: the quantized {name} of this checkpoint is not hqq's 8-bit form"
    if not isinstance(meta, Mapping) or not isinstance(codes, Tensor):
        raise ValueError(problem)
    scale, zero = meta.get("scale"), meta.get("zero")
    if not isinstance(scale, Tensor) or not isinstance(zero, Tensor):
        raise ValueError(problem)
    if read_number(meta.get("nbits")) != 8 or codes.dtype != torch.uint8:
        raise ValueError(problem)
    try:
        sides = (codes.shape, zero.shape, scale.shape)
        shape = torch.broadcast_shapes(*sides)  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ValueError(problem) from None
    if shape.numel() > codes.numel():  # would make more numbers than there are codes
        raise ValueError(problem)
    dtype = read_dtype("compute_dtype", meta.get("compute_dtype", scale.dtype))
    if dtype not in META_DTYPES:
        raise ValueError(problem)
    return (codes.to(dtype) - zero.to(dtype)) * scale.to(dtype)
