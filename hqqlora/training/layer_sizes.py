"""What the linear layers weigh, before and after."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hqqlora.linear import HQQLinear

_SAMPLE = 4096  # bytes of each tensor that enter a fingerprint


def dense_layers(model: nn.Module) -> dict[str, int]:
    """Bytes of the weight of every dense linear layer, by name."""
    return {
        name: module.weight.nbytes
        for name, module in model.named_modules()
        if type(module) is nn.Linear
    }


def linear_layer_sizes(
    model: nn.Module, dense: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Sizes of the quantized layers; `dense` is what `dense_layers` found before, None for a
    model that never was dense here.

    Codes, scales and zeros count; biases, which stay as they are, do not.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, HQQLinear)}
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    quantized = sum(m.W_q.nbytes + m.scale.nbytes + m.zero.nbytes for m in layers.values())
    sizes = {
        "count": len(layers),
        "weights": weights,
        "quantized_bytes": quantized,
        "bits_per_weight": 8 * quantized / weights,
    }
    if dense is not None:
        total = sum(dense[name] for name in layers)
        sizes |= {"dense_bytes": total, "dense_bits_per_weight": 8 * total / weights}
    return sizes


def model_fingerprint(model: nn.Module) -> str:
    """A digest of names, shapes and the first bytes of every parameter: another model, or the
    same one quantized otherwise, has another."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        sample = parameter.detach().flatten()[: _SAMPLE // parameter.element_size()]
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
