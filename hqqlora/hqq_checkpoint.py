"""qmodel.pt: what `save_quantized` of the hqq package writes, read and written.

The file is ``{module name: {tensor name: tensor}}``. The entry of a quantized layer has hqq's
metadata besides, as plain Python values, flat or (in older files) nested under "meta".
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hqqlora.files import write_torch
from hqqlora.hqq_layers import raw_state
from hqqlora.linear import HQQLinear
from hqqlora.module_names import full_name
from hqqlora.torch_files import read_torch

WEIGHTS_FILE = "qmodel.pt"

# What Llama and others once kept in each layer, and now compute.
_COMPUTED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")

ModuleStates = dict[str, dict[str, Any]]


# ---- reading -------------------------------------------------------------------------------


def read_module_states(path: str | os.PathLike[str]) -> ModuleStates:
    """The entries of a qmodel.pt, its tensors mapped from the file. Nothing that the file says
    is executed.

    Raises:
        ValueError: the file is damaged, holds other things than tensors and plain values, or is
            no such checkpoint.
        OSError: it cannot be read.
    """
    states = read_torch(path, mmap=True)
    if not isinstance(states, dict) or not states:
        raise ValueError(f"{path} is not a checkpoint of hqq: it holds no modules")
    for name, state in states.items():
        if not isinstance(name, str) or not isinstance(state, dict):
            raise ValueError(
                f"{path} is not a checkpoint of hqq: {name!r} is a {type(state).__name__}, not "
                f"the state of a module"
            )
        if strange := [key for key in state if not isinstance(key, str)]:
            raise ValueError(
                f"{path} is not a checkpoint of hqq: {name} has a {type(strange[0]).__name__} "
                f"where a tensor's name is expected"
            )
    return states


def fill_model(
    model: nn.Module,
    states: ModuleStates,
    compute_dtype: torch.dtype,
    device: torch.device,
    path: str | os.PathLike[str],
) -> None:
    """Gives `model`, whose parameters are on the meta device, the weights of `states`: an
    `HQQLinear` for each quantized layer, everything else in `compute_dtype`. Buffers that the
    model computes itself keep their dtype. All that is on the CPU stays mapped from the file
    until it is converted or moved.

    Raises:
        ValueError: an entry belongs to no module, or does not fit it; or a weight is missing.
            Names `path`, the module, what is found and what expected.
    """
    tied = _tied_names(model)
    quantized: dict[str, HQQLinear] = {}
    dense: dict[str, Tensor] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, state in states.items():
        if "W_q" in state:
            layer = _quantized_layer(modules.get(name), name, state, path)
            quantized[name] = layer.to(device, compute_dtype)
        else:
            dense.update({full_name(name, key): value for key, value in state.items()})
    # A module may go under several names, and be stored under one.
    of_module = {id(modules[name]): layer for name, layer in quantized.items()}
    quantized = {n: of_module[id(m)] for n, m in modules.items() if id(m) in of_module}
    dense = _checked(model, dense, path)
    _add_tied(dense, tied)
    _check_complete(model, dense, quantized, path)
    converted = {key: _converted(value, device, compute_dtype) for key, value in dense.items()}
    model.load_state_dict(converted, strict=False, assign=True)
    for name, layer in quantized.items():
        model.set_submodule(name, layer.train(model.training))
    _tie(model, tied, path)
    for module in model.modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, key, buffer.to(device))


def _quantized_layer(
    dense: nn.Module | None,
    name: str,
    state: Mapping[str, Any],
    path: str | os.PathLike[str],
) -> HQQLinear:
    if not isinstance(dense, nn.Linear):
        found = "no module" if dense is None else f"a {type(dense).__name__}"
        raise ValueError(f"{path}: {name} is a quantized layer, but {found} in the model")
    layer = HQQLinear(None, None, device="meta")  # to take the tensors as they are
    try:
        layer.load_state_dict(state, assign=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {name}: {error}") from error
    found, needed = _described(layer), _described(dense)
    if found != needed:
        raise ValueError(f"{path}: {name} is {found}, but the model has {needed}")
    return layer


def _described(linear: nn.Linear) -> str:
    with_bias = "without a bias" if linear.bias is None else "with a bias"
    return f"[{linear.out_features}, {linear.in_features}] {with_bias}"


def _checked(
    model: nn.Module,
    dense: Mapping[str, Any],
    path: str | os.PathLike[str],
) -> dict[str, Tensor]:
    """Those of `dense` that the model has, all of which fit; the rest is of no use."""
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    expected = model.state_dict(keep_vars=True)
    checked = {}
    for key, value in dense.items():
        if key not in expected:
            if _COMPUTED.search(key) or any(re.search(pattern, key) for pattern in ignored):
                continue
            raise ValueError(f"{path}: {type(model).__name__} has no {key}")
        shape = list(expected[key].shape)
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if found != shape:
            raise ValueError(f"{path}: {key} is {found}, but the model has {shape}")
        checked[key] = value
    return checked


def _check_complete(
    model: nn.Module,
    dense: Mapping[str, Tensor],
    quantized: Mapping[str, HQQLinear],
    path: str | os.PathLike[str],
) -> None:
    missing = [
        key
        for key, _ in model.named_parameters(remove_duplicate=False)
        if key not in dense and key.rpartition(".")[0] not in quantized
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{path} lacks {', '.join(missing[:3])}{more}")


def _converted(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(device, dtype if tensor.is_floating_point() else None)


def _tied_names(model: nn.Module) -> list[list[str]]:
    """The names under which parameters with several of them go."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _add_tied(dense: dict[str, Tensor], tied: list[list[str]]) -> None:
    """A tied weight may be stored under one of its names alone."""
    for group in tied:
        stored = [name for name in group if name in dense]
        if stored:
            dense.update({name: dense[stored[0]] for name in group if name not in dense})


def _tie(model: nn.Module, tied: list[list[str]], path: str | os.PathLike[str]) -> None:
    """Makes the tied weights one parameter again."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for first, *others in tied:
        for other in others:
            if first not in parameters or other not in parameters:
                continue  # quantized: no longer a parameter
            if not torch.equal(parameters[first], parameters[other]):
                raise ValueError(
                    f"{path}: {first} and {other} differ, but config.json ties them"
                )
            parent, _, attribute = other.rpartition(".")
            setattr(model.get_submodule(parent), attribute, parameters[first])


# ---- writing -------------------------------------------------------------------------------


def module_states(model: nn.Module) -> ModuleStates:
    """The entries of the qmodel.pt of `model`, whose tensors are the model's own. Modules that
    have both parameters and submodules have an entry, too; hqq knows none for them.

    Raises:
        ValueError: a layer carries an adapter, which hqq's file has no place for.
    """
    states: ModuleStates = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            raise ValueError(
                f"{name} is a {type(module).__name__}: save the adapter on its own, and merge "
                f"or remove it before the model is saved"
            )
        state: dict[str, Any] = {}
        if isinstance(module, HQQLinear):
            state = raw_state(module)
        else:
            module._save_to_state_dict(state, "", keep_vars=False)
        if state:
            states[name] = state
    return states


def write_module_states(states: ModuleStates, path: str | os.PathLike[str]) -> None:
    """Writes a qmodel.pt, atomically.

    Raises:
        OSError: it cannot be written; names it.
    """
    write_torch(path, states)
