"""One weight in many copies: dense, quantized by hqqlora, and the same words in hqq's layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import machine
import torch
from torch import Tensor

from hqqlora.ops import PackedWeight, Solver
from hqqlora.planes import planes_serve, repacked


def quantize(weight: Tensor, nbits: int, group_size: int, axis: int) -> PackedWeight:
    """Scale and zero in the weight's dtype."""
    parts = torch.ops.hqqlora.quantize(
        weight, nbits, group_size, axis, weight.dtype, Solver.MINMAX
    )
    return PackedWeight(*parts, *weight.shape, nbits, group_size, axis)


def hqq_layer(weight: PackedWeight, dtype: torch.dtype) -> Any:
    """hqq's own HQQLinear around the same tensors (its quantizer would take minutes)."""
    from hqq.core.quantize import HQQLinear, Quantizer

    device = str(weight.W_q.device)
    layer = HQQLinear(None, {"offload_meta": False}, compute_dtype=dtype, device=device)
    packing = Quantizer.bit_to_packing[weight.nbits]
    layer.W_q = torch.nn.Parameter(weight.W_q, requires_grad=False)
    layer.meta = {
        "nbits": weight.nbits,
        "group_size": weight.group_size,
        "shape": torch.Size([weight.out_features, weight.in_features]),
        "scale": weight.scale,
        "zero": weight.zero,
        "axis": weight.axis,
        "packing": packing,
        "unpack_view_dtype": Quantizer.unpack_view_dtype[packing],
        "view_as_float": False,
        "quant_scale": False,
        "quant_zero": False,
        "compute_dtype": dtype,
    }
    layer.ready = True
    return layer


def as_held(weight: PackedWeight) -> PackedWeight:
    """The weight as `HQQLinear` holds it: 3 bits in planes, where they fit and serve."""
    planes = planes_serve(weight.W_q.device)
    return weight._replace(W_q=repacked(weight.W_q, weight[3:], planes))


@dataclass
class Layers:
    """Copies enough that each is out of the cache when its turn comes again. Ours are packed as
    layers hold them, hqq's as hqq does."""

    N: int
    K: int
    dtype: torch.dtype
    nbits: int = 4
    group_size: int = 64
    axis: int = 1
    copies: int | None = None
    """None: enough."""
    same_numbers: bool = False
    """Whether the dense weight is the quantized one read back: for results to be compared."""
    dense: list[Tensor] = field(init=False)
    ours: list[PackedWeight] = field(init=False)
    hqq: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        weight = (torch.randn(self.N, self.K) * 0.02).to(self.dtype)
        packed = quantize(weight, self.nbits, self.group_size, self.axis)
        if self.same_numbers:
            weight = torch.ops.hqqlora.dequantize(*packed, self.dtype)
        bytes_a_round = sum(t.numel() * t.itemsize for t in (weight, *packed[:3]))
        copies = self.copies or -(-machine.cold_bytes() // bytes_a_round) + 1
        self.dense = [weight.clone() for _ in range(copies)]
        words = [
            PackedWeight(*(part.clone() for part in packed[:3]), *packed[3:])
            for _ in range(copies)
        ]
        self.ours = [as_held(weight) for weight in words]
        self.hqq = []
        if machine.peer_version():
            # another place in the rotation: hqq must not warm our copy, nor we its
            turned = words[copies // 2 :] + words[: copies // 2]
            self.hqq = [hqq_layer(weight, self.dtype) for weight in turned]

    def __len__(self) -> int:
        return len(self.dense)

    @property
    def name(self) -> str:
        """Size and dtype, as tables show it."""
        return f"{self.N} x {self.K} {DTYPE_NAMES[self.dtype]}"


DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
