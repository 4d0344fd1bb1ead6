"""Adapters merged into the base: into its few bits, or exactly into a dense layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hqqlora.expert_weights import HQQExpertWeights
from hqqlora.experts import dequantize_experts
from hqqlora.linear import HQQLinear
from hqqlora.lora import MERGED_KEYS
from hqqlora.peft.dora import HQQDoraVariant
from hqqlora.peft.experts_layer import ParamWrapper


def merge(layer: Any, adapters: Sequence[str]) -> None:
    """Adds adapters to those already in the base of `layer`, an `HQQLoraLinear`.

    The sum always starts from the codes of before the first merge, so that it is quantized
    once, whatever the number of adapters and the order of the calls.

    Raises:
        RuntimeError: an adapter has a lora_bias, but the base no bias; nothing is changed.
        ValueError: the sum is not finite; nothing is changed.
    """
    base = layer.get_base_layer()
    original = _unmerged_weight(layer, base)
    merged = original
    for name in (*layer.merged_adapters, *adapters):
        merged = _with_adapter(layer, name, original, merged)
    bias = _merged_bias(layer, base, adapters)
    if not (merged.isfinite().all() and (bias is None or bias.isfinite().all())):
        raise ValueError(
            f"{describe(layer)}: NaNs detected in the merged weights. The adapter "
            f"{' or '.join(adapters)} seems to be broken"
        )
    if isinstance(base, HQQLinear):
        before = {name: _data(base, name) for name in MERGED_KEYS}
        error = requantize(base, merged)
        if not layer.merged_adapters:
            layer.unmerged_error = layer.requantization_error
            for name, data in before.items():
                setattr(layer, f"unmerged_{name}", data)
        layer.requantization_error = error
    else:
        base.weight.data = merged.to(base.weight.dtype)
    if bias is not None:
        base.bias.data = bias.to(base.bias.dtype)
    layer.merged_adapters.extend(adapters)


def unmerge(layer: Any) -> None:
    """Brings the base of a merged `HQQLoraLinear` back, bit for bit."""
    base = layer.get_base_layer()
    for name in MERGED_KEYS:
        parameter = base._parameters[name]
        if parameter is not None:
            parameter.data = getattr(layer, f"unmerged_{name}")
        setattr(layer, f"unmerged_{name}", None)
    layer.requantization_error, layer.unmerged_error = layer.unmerged_error, None
    layer.merged_adapters.clear()


def _data(base: HQQLinear, name: str) -> Tensor | None:
    parameter = base._parameters[name]
    return None if parameter is None else parameter.data


def requantize(base: HQQLinear, weight: Tensor) -> float:
    """Gives `base` the float32 `weight`, and the relative error that its bits leave:
    |quantized - weight| / |weight| in the Frobenius norm. Says so in a warning."""
    base.requantize(weight)
    lost = (base.dequantize(torch.float32) - weight).norm()
    error = float(lost / weight.norm()) if lost > 0 else 0.0
    # The texts are few, so that each is shown once and not for every layer.
    bound = 10.0 ** math.ceil(math.log10(error)) if 0 < error < math.inf else error
    warnings.warn(
        f"a changed weight was quantized again to {base.nbits} bits: up to {bound:.3g} of it, "
        f"relative to its norm, was lost to rounding (exactly how much: "
        f"hqqlora.peft.requantization_errors(model)). "
        f"hqqlora.peft.merge_and_unload(model, dequantize=True) merges without loss",
        stacklevel=2,
    )
    return error


def describe(layer: Any) -> str:
    """The layer for a message: its name in the model where PEFT has told it."""
    return layer.target_name or f"{layer.out_features} x {layer.in_features} layer"


def requantization_errors(model: nn.Module) -> dict[str, float]:
    """For each layer of `model` whose weight an adapter has changed, by its name: the relative
    error of quantizing it again, in the merges in force and initialisations such as PiSSA."""
    return {
        name: module.requantization_error
        for name, module in model.named_modules()
        if getattr(module, "requantization_error", None) is not None
    }


def merge_and_unload(
    model: nn.Module,
    *,
    dequantize: bool = False,
    dtype: torch.dtype | None = None,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> nn.Module:
    """The base model with the adapters in its weights, as ``model.merge_and_unload()`` gives
    it. On an error, `model` is as it was.

    Args:
        model: a PeftModel on a base with quantized layers; used up.
        dequantize: False: the sums are quantized again, which costs accuracy (see the
            warning); True: every quantized layer becomes an nn.Linear that holds weight +
            adapter, added in float32 and rounded once. Its adapters may be of any kind that
            PEFT merges, but for those of experts.
        dtype: of the dense layers. None: each layer's compute_dtype.
        safe_merge, adapter_names: as in PEFT.

    Raises:
        ValueError: a sum is not finite, or PEFT cannot merge these adapters.
    """
    tuner: Any = getattr(model, "base_model", model)
    if not hasattr(tuner, "merge_adapter"):
        raise TypeError(f"{type(model).__name__} is not a PEFT model with layers to merge")
    layers = [m for m in tuner.modules() if isinstance(m, BaseTunerLayer)]
    if dequantize and any(isinstance(layer, ParamWrapper) for layer in layers):
        raise ValueError(
            "dequantize=True does not merge adapters of experts (target_parameters): "
            "model.merge_and_unload() merges them into the quantized weights"
        )
    before = [(layer, layer.base_layer, list(layer.merged_adapters)) for layer in layers]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already following adapters were merged")
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            if dequantize:
                _make_bases_dense(layers)
            tuner.merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
            if dequantize:
                _round_bases(before, dtype)
            merged: nn.Module = tuner.merge_and_unload(adapter_names=adapter_names)
    except BaseException:
        _restore(before)
        raise
    if dequantize:
        _make_dense(merged, dtype)
    return merged


# ---- parts -------------------------------------------------------------------------------


def _unmerged_weight(layer: Any, base: nn.Linear) -> Tensor:
    """W without adapters, float32, the caller's own."""
    if not isinstance(base, HQQLinear):
        return base.weight.detach().float().clone()
    if not layer.merged_adapters:
        return base.dequantize(torch.float32)
    packed = base.packed._replace(
        W_q=layer.unmerged_W_q, scale=layer.unmerged_scale, zero=layer.unmerged_zero
    )
    weight: Tensor = torch.ops.hqqlora.dequantize(*packed, torch.float32)
    return weight


def _with_adapter(layer: Any, name: str, original: Tensor, merged: Tensor) -> Tensor:
    variant = layer.lora_variant.get(name)
    if variant is None:
        plain: Tensor = merged + layer.get_delta_weight(name)
        return plain
    if isinstance(variant, HQQDoraVariant):
        delta = layer.get_delta_weight(name)
        # The norm is that of the base without other adapters.
        norms = torch.linalg.norm(original + delta, dim=1)
        factor = layer.lora_magnitude_vector[name].weight.float() / norms
        scaled: Tensor = factor[:, None] * (merged + delta)
        return scaled
    safe: Tensor = variant.merge_safe(layer, name, merged)
    return safe.float()


def _merged_bias(layer: Any, base: nn.Linear, adapters: Sequence[str]) -> Tensor | None:
    """The base's bias with those of the adapters, float32; None: no adapter has one."""
    with_bias = [name for name in adapters if layer.lora_B[name].bias is not None]
    if not with_bias:
        return None
    if base.bias is None:
        raise RuntimeError(
            f"{describe(layer)}: Impossible to merge LoRA with `lora_bias=True` because the "
            f"base layer has no bias."
        )
    total: Tensor = base.bias.float()
    for name in with_bias:
        total = total + layer.scaling[name] * layer.lora_B[name].bias.float()
    return total


def _make_bases_dense(layers: Sequence[Any]) -> None:
    """Puts float32 nn.Linears in the place of quantized bases; what was merged into few bits is
    merged into them instead."""
    for layer in layers:
        if isinstance(layer.base_layer, HQQLinear):
            merged = list(layer.merged_adapters)
            if merged:
                layer.unmerge()
            layer.base_layer = to_linear(layer.base_layer, torch.float32)
            if merged:
                layer.merge(adapter_names=merged)


def _round_bases(
    before: Sequence[tuple[Any, nn.Module, list[str]]], dtype: torch.dtype | None
) -> None:
    for layer, base, _ in before:
        if isinstance(base, HQQLinear):
            layer.base_layer.to(dtype or base.compute_dtype)


def _restore(before: Sequence[tuple[Any, nn.Module, list[str]]]) -> None:
    """Undoes merges, and puts bases back."""
    for layer, base, merged in before:
        if layer.base_layer is not base:
            layer.base_layer = base
            layer.merged_adapters.clear()
        elif layer.merged_adapters != merged:
            layer.unmerge()
        if layer.merged_adapters != merged:
            layer.merge(adapter_names=merged)


def to_linear(layer: HQQLinear, dtype: torch.dtype) -> nn.Linear:
    """A dense layer with the dequantized weight."""
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    # Not by assignment: while PEFT makes adapters without data, that ends on the meta device.
    dense._parameters["weight"] = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
    if layer.bias is not None:
        bias = layer.bias.detach().to(dtype, copy=True)
        dense._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    return dense.train(layer.training)


def _make_dense(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replaces the quantized layers that had no adapter, and has a transformers model forget
    that it was quantized."""
    for name, layer in _quantized_layers(model):
        parent, _, attribute = name.rpartition(".")
        setattr(
            model.get_submodule(parent),
            attribute,
            to_linear(layer, dtype or layer.compute_dtype),
        )
    for name, module in list(model.named_modules()):
        if isinstance(module, HQQExpertWeights):
            dequantize_experts(model, name, dtype)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    if hasattr(model, "hqq_quantized"):
        del model.hqq_quantized


def _quantized_layers(model: nn.Module) -> Iterator[tuple[str, HQQLinear]]:
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, HQQLinear):
            yield name, module
