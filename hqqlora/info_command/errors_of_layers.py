"""How far quantized weights are from the dense ones, a layer or an expert at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from hqqlora.command.checkpoint_folder import open_checkpoint
from hqqlora.command.errors import UsageError, explaining
from hqqlora.command.stored_matrix import Matrix
from hqqlora.info_command.contents import QuantizedLayer
from hqqlora.info_command.dense_matrices import dense_matrices


def relative_errors(layers: Sequence[QuantizedLayer], source: str) -> dict[str, float]:
    """``|W - Q| / |W|`` (Frobenius norms) of each layer whose weight, or experts' weights, the
    dense model `source` has under the layer's name.

    Raises:
        UsageError: `source` is no dense model, has none of the layers, or one of another shape.
    """
    tensors = open_checkpoint(source).tensors
    found = [(layer, dense_matrices(layer, tensors)) for layer in layers]
    pairs = [(layer, matrices) for layer, matrices in found if matrices]
    if not pairs:
        first = layers[0].name if layers else "any layer"
        raise UsageError(f"{source} has no weights of these layers, such as {first}.weight")
    shown = tqdm(pairs, desc="comparing", unit="layer", disable=not sys.stderr.isatty())
    return {layer.name: _relative_error(layer, matrices) for layer, matrices in shown}


def _relative_error(layer: QuantizedLayer, matrices: Sequence[Matrix]) -> float:
    if layer.experts is not None and len(matrices) != layer.experts:
        file = matrices[0].parts[0].source.file
        raise UsageError(
            f"{layer.name} has {layer.experts} experts, but {file} has {len(matrices)}"
        )
    sums = torch.zeros(2, dtype=torch.float64)
    transposed: bool | None = None
    for expert, matrix in enumerate(matrices):
        with explaining("cannot compare"):
            quantized = layer.dequantize(None if layer.experts is None else expert)
        if transposed is None:
            transposed = layer.experts is not None and _is_transposed(matrix, quantized)
        sums += _squares(layer, matrix.transposed() if transposed else matrix, quantized)
    return float((sums[0] / sums[1]).sqrt()) if sums[1] > 0 else 0.0


def _is_transposed(matrix: Matrix, quantized: Tensor) -> bool:
    """Whether `matrix`, of an expert, has the rows of `quantized` as columns. Of a square one
    the errors tell: the wrong way round they are as large as the weights."""
    shape = tuple(quantized.shape)
    if shape[0] != shape[1] or matrix.shape != shape:
        return matrix.shape == shape[::-1]
    straight, turned = (
        sum(float((stored.float() - q).square().sum()) for stored, q in m.beside(quantized))
        for m in (matrix, matrix.transposed())
    )
    return turned < straight


def _squares(layer: QuantizedLayer, matrix: Matrix, quantized: Tensor) -> Tensor:
    """|W - Q|² and |W|²."""
    if matrix.shape != tuple(quantized.shape):
        raise UsageError(
            f"{layer.name} is {list(quantized.shape)}, but {matrix.parts[0].source.file} has "
            f"{list(matrix.shape)}"
        )
    sums = torch.zeros(2, dtype=torch.float64)
    for stored, q in matrix.beside(quantized):
        weight = stored.float()
        sums[0] += (weight - q).square_().sum(dtype=torch.float64)
        sums[1] += weight.square_().sum(dtype=torch.float64)
    return sums
