"""DoRA on a quantized layer: its rows' norms without a dense weight, its product fused.

DoRA gives row n of ``W + scaling B A`` the learned length `magnitude[n]`. Its length before,

    |W_n + s (B A)_n|^2 = |W_n|^2 + 2 s (W A^T)_n . B_n + s^2 B_n (A A^T) B_n^T,

needs a product of the quantized weight with R rows and one number a row of W, which is frozen:
that number is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from hqqlora.autograd import linear, lora_linear
from hqqlora.linear import HQQLinear
from hqqlora.ops.weight import SLOTS_PER_WORD

# Elements of W that are dequantized at once to sum their squares: 16 MiB.
BLOCK = 2**22


class HQQDoraLayer(DoraLinearLayer):  # type: ignore[misc]
    """The magnitudes `weight` [N], and what is computed with them."""

    def __init__(self, base: HQQLinear, A: Tensor, B: Tensor, scaling: float) -> None:
        """Magnitudes that leave W + scaling B A as it is, float32, whatever A and B are."""
        super().__init__(fan_in_fan_out=False)
        self.row_squares = RowSquares()
        if A.is_meta:  # about to be loaded
            norms = torch.empty(base.out_features, device=A.device)
        else:
            norms = self.norms(base, A, B, scaling)
        self.weight = nn.Parameter(norms)

    def norms(self, base: HQQLinear, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """The lengths [N] of the rows of W + scaling * B A, float32; constants to autograd, as
        DoRA has it."""
        with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
            return row_norms(base, self.row_squares.of(base), A.float(), B.float(), scaling)

    def factor(self, base: HQQLinear, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """What each output is multiplied by, [N]: magnitude over norm, at least float32."""
        return self.weight.float() / self.norms(base, A, B, scaling)

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        scaling: float,
        base_layer: HQQLinear,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """What is to be added to the base's output, in separate operations; as in PEFT's layer,
        without `base_result` x comes out of dropout."""
        factor = self.factor(base_layer, lora_A.weight, lora_B.weight, scaling)
        if base_result is None:
            base_result = linear(x, base_layer.packed)
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        extra: Tensor = (factor - 1) * base_result + factor * lora_B(lora_A(x)) * scaling
        return extra

    def fused(
        self, x: Tensor, base: HQQLinear, A: Tensor, B: Tensor, scaling: float, dropout: float
    ) -> Tensor:
        """``factor * (drop(x) (W + scaling B A)^T) + (x - drop(x)) W^T + bias``, in x's dtype:
        one fused product, and a second base product if there is dropout."""
        factor = self.factor(base, A, B, scaling)
        dropped = F.dropout(x, dropout) if dropout > 0 else x
        y = lora_linear(dropped, base.packed, None, A, B, scaling)
        scaled = factor * y
        if dropout > 0:
            scaled = scaled + linear(x - dropped, base.packed)
        if base.bias is not None:
            scaled = scaled + base.bias
        return scaled.to(y.dtype)


class HQQDoraVariant(DoraLinearVariant):  # type: ignore[misc]
    """Puts an `HQQDoraLayer` in the place of PEFT's."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Called for each new adapter, after A and B have their first values."""
        if "lora_magnitude_vector" not in module.adapter_layer_names:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        module.lora_magnitude_vector[adapter_name] = HQQDoraLayer(
            module.get_base_layer(),
            module.lora_A[adapter_name].weight.detach(),
            module.lora_B[adapter_name].weight.detach(),
            module.scaling[adapter_name],
        )


class RowSquares:
    """|W_n|^2 [N] of a layer, kept until its weight is another. A copy starts empty."""

    def __init__(self) -> None:
        """Holds nothing yet."""
        self._squares: Tensor | None = None
        # The tensors they were computed from (held, so that no other takes their place in
        # memory) and how often those had been written to.
        self._source: list[tuple[Tensor, int]] = []

    def of(self, base: HQQLinear) -> Tensor:
        """The sums for `base`. While torch.compile traces, those of the last eager call."""
        if torch.compiler.is_compiling():
            return row_squares(base) if self._squares is None else self._squares
        weight = (base.W_q, base.scale, base.zero)
        if any(tensor.is_inference() for tensor in weight):  # these do not count their writes
            return row_squares(base)
        if self._squares is None or not self._is_from(weight):
            self._squares = row_squares(base)
            self._source = [(tensor.detach(), tensor._version) for tensor in weight]
        return self._squares

    def _is_from(self, weight: tuple[Tensor, ...]) -> bool:
        return all(
            tensor.data_ptr() == held.data_ptr()
            and tensor.dtype == held.dtype
            and tensor._version == version
            for tensor, (held, version) in zip(weight, self._source, strict=True)
        )

    def __reduce__(self) -> tuple[type[RowSquares], tuple[()]]:
        """For copy and pickle."""
        return RowSquares, ()


def row_norms(base: HQQLinear, squares: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """sqrt(squares + 2 s (W A^T) . B + s^2 (B A A^T) . B), [N], all float32."""
    packed = base.packed
    WA = torch.ops.hqqlora.linear(A.contiguous(), *packed[:3], None, *packed[3:]).T
    cross = (WA * B).sum(1)
    own = ((B @ (A @ A.T)) * B).sum(1)
    norms: Tensor = (squares + 2 * scaling * cross + scaling**2 * own).clamp_min(0).sqrt()
    return norms


@torch.no_grad()
def row_squares(base: HQQLinear) -> Tensor:
    """|W_n|^2 [N], float32. Where words and groups keep to rows, block by block."""
    W_q, scale, zero, N, K, nbits, G, axis = base.packed
    slots = SLOTS_PER_WORD[nbits]
    if N % slots or W_q.numel() * slots != N * K or (K % G if axis == 1 else N % G):
        return base.dequantize(torch.float32).square_().sum(1)
    words = W_q.view(N // slots, K)  # slot j of row i is of row j * (N / slots) + i of W
    squares = torch.empty(N, dtype=torch.float32, device=W_q.device)
    height = max(1, BLOCK // (slots * K))
    for start in range(0, N // slots, height):
        block = words[start : start + height]
        first = torch.arange(start, start + block.shape[0], device=W_q.device)
        rows = (torch.arange(slots, device=W_q.device)[:, None] * (N // slots) + first).view(-1)
        # With a scale of one and a zero of zero, dequantizing is unpacking.
        one = torch.ones(rows.numel(), 1, device=W_q.device)
        codes = torch.ops.hqqlora.dequantize(
            block.contiguous(), one, one * 0, rows.numel(), K, nbits, K, 1, torch.float32
        )
        codes -= _of_rows(zero, rows, N, K, G, axis)
        codes *= _of_rows(scale, rows, N, K, G, axis)
        squares[rows] = codes.square_().sum(1)
    return squares


def _of_rows(meta: Tensor, rows: Tensor, N: int, K: int, G: int, axis: int) -> Tensor:
    """The scale or zero of each element of these rows: [rows, K]."""
    if axis == 1:
        return meta.view(N, K // G)[rows].repeat_interleave(G, 1)
    return meta.view(N // G, K)[rows % (N // G)]
