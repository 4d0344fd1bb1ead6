"""Which tensors of a dense checkpoint a quantized layer was made of, told by their names alone:
transformers, which knows, is not asked."""

from __future__ import annotations

from collections.abc import Mapping

from hqqlora.command.safetensors_file import StoredTensor
from hqqlora.command.stored_matrix import Matrix
from hqqlora.info_command.contents import QuantizedLayer

# What checkpoints with a tensor for each expert call the parts of a projection.
_PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "up_proj": (("up_proj",), ("w1",), ("fc1",)),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
}


def dense_matrices(
    layer: QuantizedLayer, tensors: Mapping[str, StoredTensor]
) -> tuple[Matrix, ...]:
    """The matrix of `layer`, or those of its experts, which may be there with rows as columns;
    none: the checkpoint has them not."""
    stored = tensors.get(f"{layer.name}.weight")
    if layer.experts is None:
        found = stored is not None and len(stored.shape) == 2
        return (Matrix.whole(stored),) if found and stored is not None else ()
    stored = stored or tensors.get(layer.name)
    if stored is not None:
        return Matrix.stacked(stored) if len(stored.shape) == 3 else ()
    prefix, _, projection = layer.name.rpartition(".")
    for names in _PARTS.get(projection, ()):
        matrices = [_of_expert(f"{prefix}.{e}", names, tensors) for e in range(layer.experts)]
        whole = tuple(matrix for matrix in matrices if matrix is not None)
        if len(whole) == layer.experts:
            return whole
    return ()


def _of_expert(
    prefix: str, names: tuple[str, ...], tensors: Mapping[str, StoredTensor]
) -> Matrix | None:
    found = [tensors.get(f"{prefix}.{name}.weight") for name in names]
    parts = tuple(Matrix.whole(s) for s in found if s is not None and len(s.shape) == 2)
    return Matrix.joined(parts, 0) if len(parts) == len(names) else None
