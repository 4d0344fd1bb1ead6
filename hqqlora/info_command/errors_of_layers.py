"""How far quantized weights are from the dense ones, a layer at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

from hqqlora.command.errors import UsageError, explaining
from hqqlora.info_command.contents import QuantizedLayer
from hqqlora.quantize_command.safetensors_file import StoredTensor
from hqqlora.quantize_command.source import open_checkpoint

_PIECE = 2**24  # bytes of a dense weight in memory at a time


def relative_errors(layers: Sequence[QuantizedLayer], source: str) -> dict[str, float]:
    """``|W - Q| / |W|`` (Frobenius norms) of each layer whose weight the dense model `source`
    has under the layer's name.

    Raises:
        UsageError: `source` is no dense model, has none of the layers, or one of another shape.
    """
    tensors = open_checkpoint(source).tensors
    pairs = [
        (layer, tensors[f"{layer.name}.weight"])
        for layer in layers
        if f"{layer.name}.weight" in tensors
    ]
    if not pairs:
        first = layers[0].name if layers else "any layer"
        raise UsageError(f"{source} has no weights of these layers, such as {first}.weight")
    shown = tqdm(pairs, desc="comparing", unit="layer", disable=not sys.stderr.isatty())
    return {layer.name: _relative_error(layer, dense) for layer, dense in shown}


def _relative_error(layer: QuantizedLayer, dense: StoredTensor) -> float:
    with explaining("cannot compare"):
        quantized = layer.dequantize()
    if dense.shape != tuple(quantized.shape):
        raise UsageError(
            f"{layer.name} is {list(quantized.shape)}, but {dense.file} has {list(dense.shape)}"
        )
    flat = quantized.flatten()
    difference = norm = torch.zeros((), dtype=torch.float64)
    for first in range(0, dense.nbytes, _PIECE):
        weight = dense.read_part(first, min(_PIECE, dense.nbytes - first)).float()
        start = first // dense.dtype.itemsize
        part = flat[start : start + weight.numel()]
        difference = difference + (weight - part).pow_(2).sum(dtype=torch.float64)
        norm = norm + weight.pow_(2).sum(dtype=torch.float64)
    return float((difference / norm).sqrt()) if norm > 0 else 0.0
