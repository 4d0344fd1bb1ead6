"""First values of A and B that are made from the weight: PiSSA, OLoRA, LoftQ and MiCA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hqqlora.linear import HQQLinear
from hqqlora.low_rank import correction, nearest_of_rank
from hqqlora.peft.merging import requantize, to_linear
from hqqlora.planes import packed_like
from hqqlora.quantizing import quantize_weight


def take_from_base(layer: Any, adapter: str, initialise: Callable[[], None]) -> None:
    """PiSSA and OLoRA: `initialise` sets A and B from the dequantized weight; the base becomes
    ``W - scaling B A``, quantized again, so that base and adapter together are W as before, but
    for the error of that."""
    base = layer.get_base_layer()
    with materialized(layer, adapter), dense_base(layer) as dense:
        W = dense.weight.detach().clone()
        initialise()
        # In the dtype that PEFT is going to keep them in.
        B, A = (
            getattr(layer, name)[adapter].weight.detach().to(base.compute_dtype).float()
            for name in ("lora_B", "lora_A")
        )
    layer.requantization_error = requantize(base, W.sub_(layer.scaling[adapter] * (B @ A)))


@torch.no_grad()
def loftq(layer: Any, adapter: str, iterations: int) -> None:
    """LoftQ: looks in turns for the codes of ``W - scaling B A`` and for the B A of rank r that
    is nearest to what those codes miss of W. W is the dequantized weight, and the format the
    layer's own: if the codes miss nothing, A and B get PEFT's usual values."""
    base = layer.get_base_layer()
    r, scaling = layer.r[adapter], layer.scaling[adapter]
    W = base.dequantize(torch.float32)
    A = torch.zeros(r, base.in_features, device=W.device)
    B = torch.zeros(base.out_features, r, device=W.device)
    quantized = W
    for _ in range(iterations):
        target = W - scaling * (B @ A)
        W_q, scale, zero = quantize_weight(target, base.metadata.settings, base.scale.dtype)
        W_q = packed_like(base.W_q, W_q, base.metadata.format)
        packed = base.packed._replace(W_q=W_q, scale=scale, zero=zero)
        quantized = torch.ops.hqqlora.dequantize(*packed, torch.float32)
        B, A = nearest_of_rank(W - quantized, r)
        B = B / scaling
    if not (A.any() and B.any()):
        layer.reset_lora_parameters(adapter, True)
        return
    if not layer.lora_A[adapter].weight.is_meta:
        layer.lora_A[adapter].weight.data = A
        layer.lora_B[adapter].weight.data = B
    base.W_q.data, base.scale.data, base.zero.data = packed[:3]
    error = (quantized + scaling * (B @ A) - W).norm() / W.norm()
    layer.requantization_error = float(error)


@torch.no_grad()
def correct_quantization(
    model: nn.Module,
    dense_weight: Callable[[str], Tensor],
    adapter: str = "default",
    importance: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """LoftQ with the original weights at hand: gives each adapter the B A of its rank that is
    nearest to what quantizing has lost. The base stays as it is.

    Without `importance` nearest in the weights: the least sum of squares. With it nearest in
    what comes out: an error in column k counts by the mean square of input k (QERA, Zhang et
    al., 2024, https://arxiv.org/abs/2410.06040, its approximate form). The adapter then belongs
    to the quantized base, and not to the dense model.

    Args:
        model: a PeftModel whose adapter is new.
        dense_weight: from a layer's name, as it is in the base model, to the weight
            [out_features, in_features] from before quantization.
        adapter: the name of the adapter.
        importance: what `hqqlora.input_importance` found, float tensors [in_features] by the
            layers' names; layers that are not in it are corrected without.

    Returns:
        model.

    Raises:
        ValueError: a weight or an importance has another shape than its layer calls for; the
            layers before it have their new values.
    """
    for name, layer in model.named_modules():
        base = getattr(layer, "base_layer", None)
        if not isinstance(base, HQQLinear) or adapter not in getattr(layer, "lora_A", ()):
            continue
        name = name.removeprefix("base_model.model.")
        weight = dense_weight(name)
        if tuple(weight.shape) != (base.out_features, base.in_features):
            raise ValueError(
                f"{name}: the dense weight is {list(weight.shape)}, the layer "
                f"[{base.out_features}, {base.in_features}]"
            )
        lost = weight.to(base.device, torch.float32) - base.dequantize(torch.float32)
        of_layer = (importance or {}).get(name)
        if of_layer is not None and tuple(of_layer.shape) != (base.in_features,):
            raise ValueError(
                f"{name}: the importance is {list(of_layer.shape)}, the layer has "
                f"{base.in_features} inputs"
            )
        # (Of a layer with fewer sides than the rank, the rest of A and B stays as it began.)
        B, A = correction(lost, layer.r[adapter], of_layer)
        layer.lora_A[adapter].weight[: len(A)].copy_(A)
        layer.lora_B[adapter].weight[:, : len(A)].copy_(B / layer.scaling[adapter])
    return model


@contextmanager
def dense_base(layer: Any) -> Iterator[nn.Linear]:
    """For a while, a dense float32 nn.Linear in the place of the quantized base."""
    base = layer.base_layer
    assert isinstance(base, HQQLinear)
    dense = to_linear(base, torch.float32)
    layer.base_layer = dense
    try:
        yield dense
    finally:
        layer.base_layer = base


@contextmanager
def materialized(layer: Any, adapter: str) -> Iterator[None]:
    """For a while, A and B have data, also while an adapter is made without (PEFT's
    low_cpu_mem_usage), as the base is to be changed in the same way."""
    linears = [layer.lora_A[adapter], layer.lora_B[adapter]]
    without = [linear.weight if linear.weight.is_meta else None for linear in linears]
    device = layer.get_base_layer().device
    for linear, parameter in zip(linears, without, strict=True):
        if parameter is not None:
            # Not by assignment, which ends on the meta device again.
            linear._parameters["weight"] = nn.Parameter(
                torch.empty_like(parameter, device=device)
            )
    try:
        yield
    finally:
        for linear, parameter in zip(linears, without, strict=True):
            if parameter is not None:
                linear._parameters["weight"] = parameter
