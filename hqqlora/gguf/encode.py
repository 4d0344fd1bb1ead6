"""A model's layers and parameters as GGUF tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hqqlora.gguf.blocks import encode_q4, encode_q8, scale_and_offset
from hqqlora.gguf.container import NewTensor, import_gguf
from hqqlora.linear import HQQLinear
from hqqlora.packed_codes import unpack_codes

BLOCK = 32
DENSE_TYPES = ("F32", "F16", "BF16", "Q8_0")
# Weights that are rounded to Q8_0 at once.
_CHUNK = 2**22

RowOrder = Callable[[Tensor], Tensor]


@dataclass
class Rounding:
    """What was rounded more than once, to be said at the end."""

    layers: list[str] = field(default_factory=list)
    largest: float = 0.0
    """The largest difference of a weight."""
    largest_in: str = ""

    def add(self, layer: str, difference: float) -> None:
        """Takes note of a layer whose weights moved by up to `difference`."""
        self.layers.append(layer)
        if difference >= self.largest:
            self.largest, self.largest_in = difference, layer


def encode_layer(
    name: str,
    layer_name: str,
    layer: HQQLinear,
    reorder: RowOrder | None,
    requantize: bool,
    rounding: Rounding,
) -> NewTensor:
    """A quantized layer's weight as Q4_0, Q4_1 or Q8_0.

    Args:
        name: what GGUF calls the weight.
        layer_name: what the model calls the layer, for messages.
        layer: of any format.
        reorder: how GGUF orders its rows.
        requantize: round a layer that no block type holds to Q8_0, instead of raising.
        rounding: notes such layers, and those of 8 bits whose zeros Q8_0 does not have.

    Raises:
        ValueError: blocks cannot hold the layer; names it, and says what can be done.
    """
    if layer.in_features % BLOCK:
        raise ValueError(
            f"{layer_name}: in_features={layer.in_features} is not a multiple of {BLOCK}, the "
            f"weights of a GGUF block; leave the layer dense"
        )
    problem = _misfit(layer)
    if problem is None and layer.nbits <= 4:
        return _as_q4(name, layer_name, layer, reorder)
    if problem is None and layer.nbits == 8 and bool((layer.zero == 128).all()):
        return _as_exact_q8(name, layer_name, layer, reorder)
    if layer.nbits < 8 and not requantize:
        raise ValueError(
            f"{layer_name}: {problem}, but GGUF's blocks are {BLOCK} weights along a row; "
            f"quantize it with axis=1 and a group_size that is a multiple of {BLOCK}, or give "
            f"requantize=True to round it to Q8_0"
        )
    return _as_rounded_q8(name, layer_name, layer, reorder, rounding)


def encode_dense(
    name: str,
    parameter_name: str,
    parameter: Tensor,
    reorder: RowOrder | None,
    kind: str | None,
) -> NewTensor:
    """A parameter as numbers: F32 for vectors, otherwise `kind` (one of `DENSE_TYPES`; None:
    BF16 for bfloat16, else F16); F16 for Q8_0 where rows are not whole blocks.

    Raises:
        ValueError: F16 cannot hold an element.
    """
    shape = tuple(parameter.shape)
    kind = kind or ("BF16" if parameter.dtype == torch.bfloat16 else "F16")
    if len(shape) == 1:
        kind = "F32"
    elif kind == "Q8_0" and shape[-1] % BLOCK:
        kind = "F16"

    def make() -> Tensor:
        dense = _ordered(parameter.detach().cpu(), reorder)
        if kind == "Q8_0":
            return torch.cat([_quantize_q8(part.float()) for part in _row_chunks(dense)])
        dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        return dense.to(dtypes[kind]).contiguous().reshape(-1, shape[-1]).view(torch.uint8)

    if kind == "F16" and parameter.dtype != torch.float16:
        largest = float(parameter.detach().abs().max())
        if not largest < 65520:
            raise ValueError(
                f"{parameter_name}: {largest:g} is more than F16 holds; use "
                f"dense_type='BF16' or 'F32'"
            )
    return NewTensor(name, kind, shape, make)


# ---- parts -------------------------------------------------------------------------------


def _misfit(layer: HQQLinear) -> str | None:
    """Why the layer's groups are not runs of blocks."""
    if layer.axis != 1:
        return f"axis={layer.axis}"
    if layer.group_size % BLOCK:
        return f"group_size={layer.group_size}"
    return None


def _shape(layer: HQQLinear) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _as_q4(name: str, layer_name: str, layer: HQQLinear, reorder: RowOrder | None) -> NewTensor:
    """The codes as they are; scale and offset rounded to fp16. Fewer bits fit as well."""
    d, m = _fp16_metas(layer_name, layer)
    symmetric = layer.nbits == 4 and bool((layer.zero == 8).all())

    def make() -> Tensor:
        codes = _ordered(unpack_codes(layer.packed).cpu(), reorder)
        scale = _ordered(_per_block(d, layer), reorder)
        offset = None if symmetric else _ordered(_per_block(m, layer), reorder)
        return encode_q4(codes, scale, offset)

    return NewTensor(name, "Q4_0" if symmetric else "Q4_1", _shape(layer), make)


def _as_exact_q8(
    name: str, layer_name: str, layer: HQQLinear, reorder: RowOrder | None
) -> NewTensor:
    d, _ = _fp16_metas(layer_name, layer)

    def make() -> Tensor:
        codes = _ordered(unpack_codes(layer.packed).cpu(), reorder)
        return encode_q8(codes ^ 128, _ordered(_per_block(d, layer), reorder))

    return NewTensor(name, "Q8_0", _shape(layer), make)


def _as_rounded_q8(
    name: str,
    layer_name: str,
    layer: HQQLinear,
    reorder: RowOrder | None,
    rounding: Rounding,
) -> NewTensor:
    def make() -> Tensor:
        dense = _ordered(layer.dequantize(torch.float32).cpu(), reorder)
        rows = _quantize_q8(dense)
        rounding.add(layer_name, _difference(rows, dense))
        return rows

    return NewTensor(name, "Q8_0", _shape(layer), make)


def _fp16_metas(layer_name: str, layer: HQQLinear) -> tuple[Tensor, Tensor]:
    """d and m [groups, 1] on the CPU.

    Raises:
        ValueError: fp16 does not reach; names layer, group and value.
    """
    scale, zero = layer.scale.detach().cpu(), layer.zero.detach().cpu()
    d, m = scale_and_offset(scale, zero)
    for what, rounded, exact in (
        ("scale", d, scale.double()),
        ("scale * zero", m, scale.double() * zero.double()),
    ):
        beyond = (~rounded.isfinite()).flatten().nonzero()
        if len(beyond):
            group = int(beyond[0])
            raise ValueError(
                f"{layer_name}: {what} of group {group} is {float(exact.flatten()[group]):g}, "
                f"which the fp16 of a GGUF block does not hold"
            )
    return d, m


def _per_block(meta: Tensor, layer: HQQLinear) -> Tensor:
    """[groups, 1] -> [N, K / 32]: a group of 64 becomes two blocks with the same numbers."""
    blocks = meta.flatten().repeat_interleave(layer.group_size // BLOCK)
    return blocks.reshape(layer.out_features, -1)


def _ordered(rows: Tensor, reorder: RowOrder | None) -> Tensor:
    return (rows if reorder is None else reorder(rows)).contiguous()


def _row_chunks(dense: Tensor) -> Iterator[Tensor]:
    yield from torch.split(dense, max(1, _CHUNK // dense.shape[-1]))


def _quantize_q8(dense: Tensor) -> Tensor:
    gguf = import_gguf()
    kind = gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(gguf.quantize(dense.numpy(), kind))


def _difference(rows: Tensor, dense: Tensor) -> float:
    gguf = import_gguf()
    again = gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0)
    return float((torch.from_numpy(again) - dense).abs().max())
