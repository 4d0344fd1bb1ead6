"""Where in a dense checkpoint the experts of a mixture are: in one 3-D tensor for a projection,
or in tensors of their own, which transformers stacks and joins when it loads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import core_model_loading
from transformers.core_model_loading import Concatenate, MergeModulelist

from hqqlora.command.errors import UsageError
from hqqlora.command.safetensors_file import StoredTensor
from hqqlora.command.stored_matrix import Matrix
from hqqlora.experts import expert_parameters

_Transpose = getattr(core_model_loading, "Transpose", None)
_NUMBERED = re.compile(r"(.+)\.\d+\.[^\d].*")  # experts.3.w1.weight

_Stack = tuple[Matrix, ...]


@dataclass(frozen=True)
class ExpertStack:
    """A projection of experts. `matrices` [out_features, in_features], one for each expert;
    none: they are not in a form that is known. `layer`: what it is called when quantized."""

    layer: str
    matrices: _Stack
    sources: tuple[StoredTensor, ...]


def expert_stacks(
    model: nn.Module, names: Any, tensors: Iterable[StoredTensor]
) -> dict[str, ExpertStack]:
    """The projections of experts in `model` whose weights are among `tensors`, by the name of
    the parameter. `names`: the model's `ModelNames`.

    Raises:
        UsageError: some experts of a projection are missing, or have another shape.
    """
    parameters = {name: (module, weight) for name, module, weight in expert_parameters(model)}
    found: dict[str, list[StoredTensor]] = {}
    if parameters:
        for stored in tensors:
            key = names.key(stored.name)
            if key in parameters:
                found.setdefault(key, []).append(stored)
    stacks = {}
    for name, sources in found.items():
        # In the order in which transformers stacks them.
        sources.sort(key=lambda s: core_model_loading.dot_natural_key(s.name))
        module, weight = parameters[name]
        matrices = _matrices(name, tuple(weight.shape), names, sources)
        if module.is_transposed:
            matrices = tuple(matrix.transposed() for matrix in matrices)
        layer = _written_name(name, names, sources[0])
        stacks[name] = ExpertStack(layer, matrices, tuple(sources))
    return stacks


def _matrices(
    name: str, shape: tuple[int, ...], names: Any, sources: list[StoredTensor]
) -> _Stack:
    """Those of the parameter `name` of shape [E, rows, columns], as it has them."""
    conversions = [names.conversion_of(stored.name) for stored in sources]
    converters = {id(converter): converter for converter, _ in conversions}
    if len(converters) > 1 or not all(stored.dtype.is_floating_point for stored in sources):
        return ()
    (converter,) = converters.values()
    stack: _Stack | None
    if converter is None:
        stack = _of_one(sources)
    else:
        collected: dict[str, list[StoredTensor]] = {}
        for stored, (_, pattern) in zip(sources, conversions, strict=True):
            collected.setdefault(pattern, []).append(stored)
        stack = _converted(name, shape, converter, collected)
    if stack is None:
        return ()
    if (len(stack), *stack[0].shape) != shape or len({m.shape for m in stack}) != 1:
        raise UsageError(
            f"{name} is {[len(stack), *stack[0].shape]} in {sources[0].file}, but the model "
            f"that config.json describes has {list(shape)}"
        )
    return stack


def _of_one(sources: list[StoredTensor]) -> _Stack | None:
    if len(sources) != 1 or len(sources[0].shape) != 3 or sources[0].numel == 0:
        return None
    return Matrix.stacked(sources[0])


def _converted(
    name: str,
    shape: tuple[int, ...],
    converter: Any,
    collected: Mapping[str, list[StoredTensor]],
) -> _Stack | None:
    """What transformers' `converter` makes of the tensors that its patterns have `collected`;
    None: it does something that is not known here."""
    merges = any(type(op) is MergeModulelist for op in converter.operations)
    stacks: dict[str, _Stack | None] = {}
    for pattern in converter.source_patterns:
        if pattern in collected:
            sources = collected[pattern]
            stacks[pattern] = _merged(name, shape[0], sources) if merges else _of_one(sources)
    current = list(stacks.values())
    for operation in converter.operations:
        known = [stack for stack in current if stack is not None]
        if len(known) < len(current):
            return None
        if type(operation) is MergeModulelist and operation.dim == 0:
            continue
        if type(operation) is Concatenate and operation.dim in (1, 2):
            current = [_joined(known, operation.dim - 1)]
        elif _Transpose is not None and type(operation) is _Transpose:
            if {operation.dim0, operation.dim1} != {1, 2} or len(known) != 1:
                return None
            (stack,) = known
            if not operation.check_dims or (len(stack), *stack[0].shape) != shape:
                current = [tuple(matrix.transposed() for matrix in stack)]
        else:
            return None
    return current[0] if len(current) == 1 else None


def _merged(name: str, experts: int, sources: list[StoredTensor]) -> _Stack | None:
    if any(len(stored.shape) != 2 or stored.numel == 0 for stored in sources):
        return None
    if len(sources) != experts:
        raise UsageError(
            f"{name} has {experts} experts, but {sources[0].file.parent} has {len(sources)} "
            f"tensors such as {sources[0].name}"
        )
    return tuple(map(Matrix.whole, sources))


def _joined(stacks: list[_Stack], axis: int) -> _Stack | None:
    if len({len(stack) for stack in stacks}) != 1:
        return None
    joined = [Matrix.joined(of_expert, axis) for of_expert in zip(*stacks, strict=True)]
    whole = tuple(matrix for matrix in joined if matrix is not None)
    return whole if len(whole) == len(joined) else None


def _written_name(name: str, names: Any, first: StoredTensor) -> str:
    """Beside the other tensors of its block, as `save_pretrained` would have it, if the loader
    knows it by that name."""
    if len(first.shape) == 3:
        written = first.name.removesuffix(".weight")
    else:
        numbered = _NUMBERED.fullmatch(first.name)
        written = f"{numbered[1]}.{name.rpartition('.')[2]}" if numbered else name
    return written if names.loads_as(written, name) else name
