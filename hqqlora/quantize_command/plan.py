"""What becomes of each tensor of a dense checkpoint: quantized, copied, or left out.

Which layers are quantized, and how, the quantizer of `from_pretrained` decides, asked with a
model of the checkpoint's class that has no data. What is written here is what it and
`save_pretrained` would have written.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hqqlora.command.checkpoint_folder import DenseCheckpoint
from hqqlora.command.errors import UsageError, explaining
from hqqlora.command.safetensors_file import StoredTensor
from hqqlora.command.stored_matrix import Matrix
from hqqlora.config import QuantSettings
from hqqlora.experts import as_experts, is_experts, is_projection
from hqqlora.module_names import linear_tag
from hqqlora.optional_packages import command_for
from hqqlora.quantize_command.correction import adapter_config, with_correction
from hqqlora.quantize_command.options import QuantizeOptions
from hqqlora.quantize_command.step import Step
from hqqlora.state_encoding import LayerMetadata
from hqqlora.state_values import META_DTYPES

_CONVERTED = "split or fused by transformers when it loads"
_SKIPPED = "not to be quantized"
_UNKNOWN_EXPERTS = "experts in a form that is not known"


@dataclass(frozen=True)
class Plan:
    """All steps, in the order of the source's files, and what goes around them."""

    steps: tuple[Step, ...]
    left_out: Mapping[str, str]
    """Tensors that are not written -> why."""
    config: Mapping[str, Any]
    """The new config.json."""
    warnings: tuple[str, ...]
    adapter: Mapping[str, Any] | None = None
    """The configuration of the correction (see `--correction`), but for the base's name."""

    @property
    def layers(self) -> list[Step]:
        """The steps that quantize."""
        return [step for step in self.steps if step.metadata is not None]

    @property
    def dense(self) -> list[Step]:
        """The steps that copy."""
        return [step for step in self.steps if step.metadata is None]


def make_plan(checkpoint: DenseCheckpoint, options: QuantizeOptions) -> Plan:
    """Decides about every tensor, from headers alone.

    Raises:
        UsageError: transformers cannot build the model; the options mean no layer, or do not
            fit one; or the checkpoint lacks a weight or has one of another shape.
    """
    with explaining(f"transformers cannot be used: {command_for('transformers')}"):
        import hqqlora.transformers  # which teaches it what to do
        from hqqlora.quantize_command.expert_plan import expert_stacks
        from hqqlora.transformers import HqqConfig
        from hqqlora.transformers.checkpoint_names import ModelNames
        from hqqlora.transformers.layer_plan import layers_to_quantize, tied_modules
        from hqqlora.transformers.module_dtypes import ModuleDtypes
    _ = hqqlora.transformers
    with explaining("cannot quantize with these options"):
        config = HqqConfig(
            options.bits,
            options.group_size,
            axis=options.axis,
            solver=options.solver,
            dynamic_config=options.dynamic_config,
            skip_modules=options.skip_modules,
        )
    model = _skeleton(checkpoint, options.dtype)
    dtype: torch.dtype = model.dtype
    names, dtypes = ModelNames(model), ModuleDtypes(model, dtype)
    with warnings.catch_warnings(record=True) as caught, explaining("cannot quantize"):
        warnings.simplefilter("always")
        settings = layers_to_quantize(model, config, dtype)
    tied = tied_modules(model)
    state = model.state_dict()
    left_out = _duplicates(model, names, checkpoint, only_headers=options.dry_run)
    kept = [tensor for name, tensor in checkpoint.tensors.items() if name not in left_out]
    stacks = expert_stacks(model, names, kept)
    steps: list[Step] = []
    done: dict[str, LayerMetadata] = {}
    for stored in kept:
        key = names.key(stored.name)
        module, _, kind = key.rpartition(".")
        target = _target_dtype(stored, key, state, dtypes.of(module), dtype)
        converted = names.is_converted(stored.name)
        if kind == "weight" and module in settings and not converted:
            of_layer = settings[module]
            done[module] = _metadata(stored, model.get_submodule(module), of_layer, target)
            layer = stored.name.removesuffix(".weight")
            matrices = (Matrix.whole(stored),)
            steps.append(Step(stored, target, done[module], "", layer, matrices, module=module))
        elif key in settings and stacks[key].matrices:
            if key not in done:  # with the first of its tensors all of it is written
                stack = stacks[key]
                shape = stack.matrices[0].shape
                done[key] = LayerMetadata(settings[key], *shape, target)
                steps.append(
                    Step(stored, target, done[key], "", stack.layer, stack.matrices, True)
                )
        else:
            why = _why_dense(key, module, model, state, tied, converted)
            if key in stacks:
                why = _UNKNOWN_EXPERTS if key in settings else _SKIPPED
            steps.append(Step(stored, target, why_dense=why))
    _check_complete(model, settings, done, checkpoint)
    adapter = None
    if options.correction is not None:
        steps = with_correction(steps, options.correction)
        adapter = adapter_config(model, steps, options.correction)
    return Plan(
        tuple(steps),
        left_out,
        _new_config(model, config, done),
        tuple(dict.fromkeys(str(warning.message) for warning in caught)),
        adapter,
    )


def _skeleton(checkpoint: DenseCheckpoint, dtype: str) -> Any:
    """The model of the checkpoint's class, without data."""
    model_class, config = model_class_of(checkpoint, dtype)
    with (
        explaining(f"transformers cannot build the model of {checkpoint.folder}"),
        torch.device("meta"),
    ):
        return model_class._from_config(config, dtype=config.dtype)


def model_class_of(checkpoint: DenseCheckpoint, dtype: str) -> tuple[Any, Any]:
    """transformers' class for the checkpoint, and its configuration, with the dtype of
    `--dtype`.

    Raises:
        UsageError: transformers does not know it, or the dtype is none to quantize.
    """
    import transformers

    with explaining(f"transformers cannot build the model of {checkpoint.folder}"):
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
        names = config.architectures or []
        model_class: Any = getattr(transformers, names[0], None) if names else None
        if not isinstance(model_class, type):
            raise ValueError(
                f"config.json names architectures={names}, and transformers "
                f"{transformers.__version__} has no such class"
            )
        wanted = _dtype(checkpoint, config) if dtype == "auto" else getattr(torch, dtype)
        if wanted not in META_DTYPES:
            raise ValueError(f"the weights are {wanted}: give --dtype")
        config.dtype = wanted
        return model_class, config


def _dtype(checkpoint: DenseCheckpoint, config: Any) -> torch.dtype:
    """What `from_pretrained` takes for dtype="auto"."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    for stored in checkpoint.tensors.values():
        if stored.dtype.is_floating_point:
            return stored.dtype
    return torch.float32


def _target_dtype(
    stored: StoredTensor,
    key: str,
    state: Mapping[str, Any],
    of_module: torch.dtype,
    usual: torch.dtype,
) -> torch.dtype:
    """The dtype in which `from_pretrained` would have the tensor."""
    if key not in state or not stored.dtype.is_floating_point:
        return stored.dtype
    if of_module != usual:
        return of_module
    found: torch.dtype = state[key].dtype
    return found


def _metadata(
    stored: StoredTensor, linear: Any, settings: QuantSettings, dtype: torch.dtype
) -> LayerMetadata:
    shape = (linear.out_features, linear.in_features)
    if stored.shape != shape:
        raise UsageError(
            f"{stored.name} is {list(stored.shape)} in {stored.file}, but the model that "
            f"config.json describes has {list(shape)}"
        )
    return LayerMetadata(settings, *shape, dtype)


def _why_dense(
    key: str,
    module: str,
    model: nn.Module,
    state: Mapping[str, Any],
    tied: Mapping[str, str],
    converted: bool,
) -> str:
    if key not in state:
        return _CONVERTED if converted else "the model has no such tensor"
    parent = model.get_submodule(module) if module else model
    if type(parent) is nn.Linear and key.endswith(".weight"):
        if module in tied:
            return f"tied to {tied[module]}"
        return _CONVERTED if converted else _SKIPPED
    if _is_router(model, module, state[key]):
        return "a router"
    if state[key].dim() == 3 and "expert" in key:
        return _UNKNOWN_EXPERTS
    return ""


def _is_router(model: nn.Module, module: str, weight: torch.Tensor) -> bool:
    """Whether `weight`, of the module `module`, has a row for each of the experts beside it."""
    if weight.dim() != 2:
        return False
    siblings = model.get_submodule(module.rpartition(".")[0]).children()
    experts = [child for child in siblings if is_experts(child)]
    return any(weight.size(0) == len(child.get_parameter("down_proj")) for child in experts)


def _duplicates(
    model: Any, names: Any, checkpoint: DenseCheckpoint, only_headers: bool
) -> dict[str, str]:
    """Tensors that are stored beside the one they are tied to, and are the same (by their
    headers, or element by element)."""
    stored_as = {names.key(name): name for name in checkpoint.tensors}
    left_out = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        first, second = stored_as.get(source), stored_as.get(target)
        if first is None or second is None or first == second:
            continue
        if _same(checkpoint.tensors[first], checkpoint.tensors[second], only_headers):
            left_out[second] = f"the same as {first}, which it is tied to"
    return left_out


def _same(a: StoredTensor, b: StoredTensor, only_headers: bool) -> bool:
    if only_headers or (a.dtype, a.shape) != (b.dtype, b.shape):
        return (a.dtype, a.shape) == (b.dtype, b.shape)
    part = 2**24
    return all(
        torch.equal(
            a.read_part(first, min(part, a.nbytes - first)).view(torch.uint8),
            b.read_part(first, min(part, a.nbytes - first)).view(torch.uint8),
        )
        for first in range(0, a.nbytes, part)
    )


def _check_complete(
    model: nn.Module,
    settings: Mapping[str, QuantSettings],
    done: Mapping[str, LayerMetadata],
    checkpoint: DenseCheckpoint,
) -> None:
    """UsageError if layers of a kind are there, but not all of them. (What is not there at
    all, such as a new classifier, transformers initialises and reports.)"""
    kinds = {linear_tag(name): name for name in done}
    for name in settings:
        if name not in done and linear_tag(name) in kinds:
            weight = name if is_projection(model, name) else f"{name}.weight"
            raise UsageError(
                f"{checkpoint.folder} has no {weight}, but it has {kinds[linear_tag(name)]}"
            )
    if not done:
        raise UsageError(
            f"{checkpoint.folder} has no weight of the layers to quantize, such as "
            f"{next(iter(settings))}"
        )


def _new_config(model: Any, config: Any, done: Mapping[str, LayerMetadata]) -> dict[str, Any]:
    """config.json as `save_pretrained` writes it of the quantized model."""
    from hqqlora import HQQExpertWeights, HQQLinear
    from hqqlora.transformers import HqqQuantizer

    for name, metadata in done.items():
        if is_projection(model, name):
            prefix, _, key = name.rpartition(".")
            experts = model.get_parameter(name).size(0)
            stack = HQQExpertWeights(experts, metadata, device="meta")
            as_experts(model, prefix).put(key, stack)
            continue
        layer = HQQLinear(
            model.get_submodule(name),
            metadata.settings.to_config(),
            compute_dtype=metadata.compute_dtype,
            device="meta",
            initialize=False,
        )
        model.set_submodule(name, layer)
    quantizer = HqqQuantizer(config)
    quantizer._name_tags(model, list(done))
    model.config.quantization_config = quantizer.quantization_config
    model.config.architectures = [type(model).__name__]
    written: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
    return written
