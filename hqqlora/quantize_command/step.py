"""One step of the work: what becomes of a tensor of the dense checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hqqlora.adapter_files import PREFIX
from hqqlora.command.safetensors_file import StoredTensor, TensorShape
from hqqlora.command.stored_matrix import Matrix
from hqqlora.ops.weight import word_dtype
from hqqlora.state_encoding import LayerMetadata


@dataclass(frozen=True)
class Step:
    """With `metadata`, weights to be quantized: the `matrices` of the layer that is written as
    `layer`, all those of a projection of experts where `is_stack`; `source` is the first
    tensor they are in. Otherwise `source` is copied in `dtype`, and `why_dense` says why."""

    source: StoredTensor
    dtype: torch.dtype
    metadata: LayerMetadata | None = None
    why_dense: str = ""
    layer: str = ""
    matrices: tuple[Matrix, ...] = ()
    is_stack: bool = False
    module: str = ""
    """The linear layer, by its name in the model; "" of anything else."""
    importance: Tensor | None = field(default=None, compare=False)
    """[in_features], of its columns (see `hqqlora.input_importance`); None: all the same."""
    correction: int = 0
    """The rank of the adapter that corrects it; 0: none."""

    @property
    def numel(self) -> int:
        """The number of weights."""
        return sum(m.numel for m in self.matrices) if self.matrices else self.source.numel

    @property
    def nbytes(self) -> int:
        """What they take in the source."""
        return sum(m.nbytes for m in self.matrices) if self.matrices else self.source.nbytes

    @property
    def largest_tensor(self) -> int:
        """The bytes of the largest tensor of the source that this step has to do with."""
        tensors = [part.source.nbytes for m in self.matrices for part in m.parts]
        return max(tensors, default=self.source.nbytes)

    @property
    def work_dtype(self) -> torch.dtype:
        """The dtype that matrices are read in: `dtype`, unless that only has more bits."""
        stored = {part.source.dtype for m in self.matrices for part in m.parts}
        if stored == {torch.bfloat16} or stored == {torch.float16}:
            return stored.pop() if self.dtype == torch.float32 else self.dtype
        return self.dtype

    def results(self) -> dict[str, TensorShape]:
        """What is written of it."""
        if self.metadata is None:
            return {self.source.name: TensorShape(self.dtype, self.source.shape)}
        stack = (len(self.matrices),) if self.is_stack else ()
        return layer_tensors(self.layer, self.metadata, stack)

    def factors(self) -> dict[str, TensorShape]:
        """What is written of its correction, under the names of PEFT's files."""
        if not self.correction:
            return {}
        rows, columns = self.matrices[0].shape
        shapes = {"lora_A": (self.correction, columns), "lora_B": (rows, self.correction)}
        return {
            f"{PREFIX}{self.module}.{factor}.weight": TensorShape(torch.float32, shape)
            for factor, shape in shapes.items()
        }


def layer_tensors(
    layer: str, metadata: LayerMetadata, stack: tuple[int, ...] = ()
) -> dict[str, TensorShape]:
    """The tensors of a quantized layer, without its bias, under their names in a checkpoint;
    `stack` is [experts] or nothing."""
    dtype = metadata.compute_dtype
    rows, columns = metadata.packed_shape
    word = word_dtype(metadata.settings.nbits)
    if metadata.settings.view_as_float:
        columns, word = columns * word.itemsize // dtype.itemsize, dtype
    tensors = {
        "W_q": TensorShape(word, (*stack, rows, columns)),
        "scale": TensorShape(dtype, (*stack, *metadata.meta_shape)),
        "zero": TensorShape(dtype, (*stack, *metadata.meta_shape)),
        **{key: TensorShape.of(value) for key, value in metadata.encoded().items()},
    }
    return {f"{layer}.{key}": shape for key, shape in tensors.items()}
