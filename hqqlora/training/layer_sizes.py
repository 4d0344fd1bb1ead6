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


def linear_layer_sizes(model: nn.Module, dense: Mapping[str, int]) -> dict[str, Any]:
    """Sizes of the layers that are quantized now; `dense` is what `dense_layers` found before.

    Codes, scales and zeros count; biases, which stay as they are, do not.
    """
    weights = dense_bytes = quantized_bytes = count = 0
    for name, module in model.named_modules():
        if isinstance(module, HQQLinear):
            count += 1
            weights += module.in_features * module.out_features
            dense_bytes += dense[name]
            quantized_bytes += module.W_q.nbytes + module.scale.nbytes + module.zero.nbytes
    return {
        "count": count,
        "weights": weights,
        "dense_bytes": dense_bytes,
        "quantized_bytes": quantized_bytes,
        "dense_bits_per_weight": 8 * dense_bytes / weights,
        "bits_per_weight": 8 * quantized_bytes / weights,
    }


def model_fingerprint(model: nn.Module) -> str:
    """A digest of names, shapes and the first bytes of every parameter: another model, or the
    same one quantized otherwise, has another."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        sample = parameter.detach().flatten()[: _SAMPLE // parameter.element_size()]
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
