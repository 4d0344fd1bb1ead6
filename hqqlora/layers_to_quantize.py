"""Which linear layers of a model are to be quantized, and how."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hqqlora.config import QuantSettings
from hqqlora.expert_weights import HQQExpertWeights
from hqqlora.experts import expert_parameters, matrix_shape, settings_for_experts
from hqqlora.linear import HQQLinear
from hqqlora.module_names import first_match, full_name, matches

# Parts of a name that say a linear layer is somebody's adapter.
_ADAPTER_PARTS = frozenset({"lora_A", "lora_B"})


def layers_to_quantize(
    model: nn.Module, config: Mapping[str, Any], skip_modules: tuple[str, ...]
) -> dict[str, tuple[list[str], QuantSettings]]:
    """For each layer to quantize, under one of its names: all its names, and how; and so for
    each projection of experts. Holds no reference to a module, so that none outlives its
    replacement. See `hqqlora.quantize_model` for `config` and `skip_modules`.

    Raises:
        ValueError: there is none, or a group size does not divide a weight; names the layer.
    """
    patterns = _parse_patterns(config)
    used: set[str] = set()
    plan: dict[int, tuple[list[str], QuantSettings]] = {}
    warned: set[int] = set()
    tied = tied_weights(model)
    for name, module in model.named_modules(remove_duplicate=False):
        used.update(pattern for pattern in patterns if matches(name, pattern))
        if type(module) is not nn.Linear or _ADAPTER_PARTS.intersection(name.split(".")):
            continue
        if id(module) in plan:
            plan[id(module)][0].append(name)
            continue
        if first_match(name, skip_modules) is not None:
            continue
        pattern = first_match(name, patterns)
        settings = None if pattern is None else patterns[pattern]
        if settings is None or id(module) in warned:
            continue
        reason = why_left_dense(model, name, module, tied)
        if reason:
            warnings.warn(f"{name} stays dense: {reason}", stacklevel=3)
            warned.add(id(module))
            continue
        settings.group_size_for(module.out_features, module.in_features, name)
        plan[id(module)] = ([name], settings)
    for name, experts, parameter in expert_parameters(model):
        used.update(pattern for pattern in patterns if matches(name, pattern))
        if id(parameter) in plan:
            plan[id(parameter)][0].append(name)
            continue
        pattern = first_match(name, patterns)
        settings = None if pattern is None else patterns[pattern]
        if settings is None or first_match(name, skip_modules) is not None:
            continue
        settings = settings_for_experts(settings)
        settings.group_size_for(*matrix_shape(experts, parameter), name)
        plan[id(parameter)] = ([name], settings)
    for pattern in patterns.keys() - used:
        warnings.warn(f"no module's name matches the pattern {pattern!r}", stacklevel=3)
    warn_of_unknown_stacks(model)
    if not plan and not any(
        isinstance(module, (HQQLinear, HQQExpertWeights)) for module in model.modules()
    ):
        raise ValueError(
            f"no layer of {type(model).__name__} is to be quantized: none is an nn.Linear that "
            f"the configuration means and skip_modules={list(skip_modules)} does not"
        )
    return {places[0]: (places, settings) for places, settings in plan.values()}


def _parse_patterns(config: Mapping[str, Any]) -> dict[str, QuantSettings | None]:
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a configuration dict, not {type(config).__name__}")
    per_pattern = bool(config) and all(
        value is None or isinstance(value, Mapping) for value in config.values()
    )
    if not per_pattern or "weight_quant_params" in config:
        return {"*": QuantSettings.parse(config)}
    return {
        pattern: None if value is None else QuantSettings.parse(value)
        for pattern, value in config.items()
    }


def tied_weights(model: nn.Module) -> dict[int, set[str]]:
    """Where a tensor is used under more than one module: its address -> parameter names."""
    names: dict[int, set[str]] = {}
    modules: dict[int, set[int]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            address = _address(parameter)
            names.setdefault(address, set()).add(full_name(prefix, key))
            modules.setdefault(address, set()).add(id(module))
    return {address: names[address] for address in names if len(modules[address]) > 1}


def _address(parameter: torch.Tensor) -> int:
    """Equal for parameters that share memory, also if they are two objects."""
    if parameter.is_meta or parameter.numel() == 0:
        return -id(parameter)
    return parameter.data_ptr()


def why_left_dense(
    model: nn.Module, name: str, module: nn.Linear, tied: Mapping[int, Iterable[str]]
) -> str | None:
    """Why the layer `name` cannot be quantized; None: it can. `tied` is of `tied_weights`."""
    if (address := _address(module.weight)) in tied:
        others = sorted(set(tied[address]) - {f"{name}.weight"})
        return f"its weight is tied to {', '.join(others)}"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads the weight itself in inference"
    return None


def unquantized_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights of `model` that are dense, of two and more dimensions, each under one name:
    embeddings, routers, convolutions and what was left out or is not known here. Adapters are
    not among them."""
    return [
        (full_name(prefix, key), parameter)
        for prefix, module in model.named_modules()
        if not isinstance(module, (HQQLinear, HQQExpertWeights))
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2
        and not any(part.startswith("lora_") for part in (*prefix.split("."), key))
    ]


def warn_of_unknown_stacks(model: nn.Module) -> None:
    """Mixtures of experts have most of their weights in 3-D parameters, of which only those are
    known that transformers describes: of others, warns that they stay dense."""
    known = {id(parameter) for _, _, parameter in expert_parameters(model)}
    stacks = [
        (name, parameter)
        for name, parameter in unquantized_parameters(model)
        if parameter.dim() == 3
        and parameter.size(0) > 1
        and id(parameter) not in known
        and not _is_of_torch(model.get_submodule(name.rpartition(".")[0]))
    ]
    if stacks:
        name, parameter = stacks[0]
        size = sum(parameter.numel() * parameter.element_size() for _, parameter in stacks)
        warnings.warn(
            f"{len(stacks)} expert parameters ({size / 2**20:.0f} MiB), such as {name} "
            f"{list(parameter.shape)}, stay dense: of 3-D parameters only those are quantized "
            f"that belong to experts modules in transformers' form",
            stacklevel=4,
        )


def _is_of_torch(module: nn.Module) -> bool:
    """Whether the module's class is one of torch's own, such as Conv1d."""
    return type(module) is not nn.Module and type(module).__module__.startswith("torch.")
