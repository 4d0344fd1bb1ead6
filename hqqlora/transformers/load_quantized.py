"""Building the quantized layers of a model before transformers loads a quantized checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn

from hqqlora.expert_weights import HQQExpertWeights
from hqqlora.experts import as_experts, expert_parameters, matrix_shape, settings_for_experts
from hqqlora.linear import HQQLinear
from hqqlora.module_names import linear_tag
from hqqlora.state_encoding import METADATA_KEYS, LayerMetadata
from hqqlora.transformers.checkpoint_layers import (
    CheckpointContents,
    CheckpointLayer,
    contents_of,
    words_of,
)
from hqqlora.transformers.checkpoint_names import ModelNames
from hqqlora.transformers.config import HqqConfig
from hqqlora.transformers.integer_codes import keep_integers
from hqqlora.transformers.layer_plan import LayerSettings, tied_modules
from hqqlora.transformers.module_dtypes import ModuleDtypes

# The loader has no place for these: the layers have been built from them.
_METADATA = r"\.(" + "|".join(map(re.escape, METADATA_KEYS)) + r")$"


def prepare_quantized(
    model: Any, config: HqqConfig, dtype: torch.dtype, files: Sequence[str] | None
) -> None:
    """Puts an `HQQLinear` without data in the place of each linear layer that the checkpoint
    has quantized, and an `HQQExpertWeights` in that of each projection of experts. Nothing is
    changed if that fails.

    Raises:
        ValueError: no layer is quantized there, or one is missing, incomplete, or of another
            shape than the model's; names it, with what is found and what is expected.
    """
    _check_places(model, files or ())
    contents = contents_of(files) if files else None
    found = _as_configured(model, config, dtype) if contents is None else contents.layers
    if not found:
        raise ValueError(
            "config.json says that the checkpoint is quantized (quant_method 'hqq'), but it "
            "has no quantized layer"
        )
    names = ModelNames(model)
    settings_of = LayerSettings(config)
    dtypes = ModuleDtypes(model, dtype)
    experts = {name: (module, weight) for name, module, weight in expert_parameters(model)}
    layers: dict[str, HQQLinear | HQQExpertWeights] = {}
    for stored_name, layer in found.items():
        name = names.of(stored_name)
        if name is None:
            _refuse_experts(model, stored_name)
            continue  # transformers reports it as unexpected
        if name in experts and layer.num_experts is None:
            _refuse_expert(model, stored_name)
        if name in experts:
            module, weight = experts[name]
            shape = matrix_shape(module, weight)
            metadata = layer.metadata or _configured_metadata(name, shape, settings_of, dtype)
            layers[name] = _build_experts(
                name, (weight.size(0), *shape), layer, metadata, dtypes.of(name)
            )
            continue
        dense = model.get_submodule(name)
        shape = (dense.out_features, dense.in_features)
        metadata = layer.metadata or _configured_metadata(name, shape, settings_of, dtype)
        layers[name] = _build(name, dense, layer, metadata, dtypes.of(name))
    if contents is not None:
        _check_complete(model, layers, names, contents)
    for name, built in layers.items():
        if isinstance(built, HQQExpertWeights):
            prefix, _, key = name.rpartition(".")
            as_experts(model, prefix).put(key, built)
        else:
            model.set_submodule(name, built)
    keep_integers(model)
    ignored = model._keys_to_ignore_on_load_unexpected
    kind = list if ignored is None else type(ignored)  # a list or a set: versions differ
    model._keys_to_ignore_on_load_unexpected = kind([*(ignored or ()), _METADATA])


def _check_places(model: Any, files: Sequence[str]) -> None:
    """ValueError if the index of a local folder names a file outside it."""
    folder = str(getattr(model.config, "_name_or_path", ""))
    if not os.path.isdir(folder):
        return  # a name, whose files huggingface_hub keeps in its cache
    for file in files:
        if os.path.relpath(file, folder).split(os.sep)[0] == os.pardir:
            raise ValueError(f"the index of {folder} names {file}, which is not in it")


def restore_words(model: nn.Module) -> None:
    """After loading: W_q as whole numbers, wherever the checkpoint has it as floats."""
    for name, layer in model.named_modules():
        if not isinstance(layer, HQQLinear) or not layer.W_q.is_floating_point():
            continue
        if layer.W_q.is_meta:
            raise ValueError(
                f"{name}: a checkpoint with view_as_float cannot be offloaded: quantize "
                f"the model again without it"
            )
        words = words_of(layer.W_q.detach(), layer.metadata)
        layer.W_q = nn.Parameter(words, requires_grad=False)


def _build(
    name: str,
    dense: nn.Linear,
    layer: CheckpointLayer,
    metadata: LayerMetadata,
    compute_dtype: torch.dtype,
) -> HQQLinear:
    shape = (metadata.out_features, metadata.in_features)
    if shape != (dense.out_features, dense.in_features):
        raise ValueError(
            f"{name}: the checkpoint's weight is {list(shape)}, the model's "
            f"[{dense.out_features}, {dense.in_features}]"
        )
    if (layer.bias is None) != (dense.bias is None):
        with_bias, without = ("model", "checkpoint")
        if layer.bias is not None:
            with_bias, without = without, with_bias
        raise ValueError(f"{name}: the {with_bias}'s layer has a bias, the {without}'s has not")
    layer.checked(metadata, name)
    try:
        built = HQQLinear(
            dense,
            metadata.settings.to_config(),
            compute_dtype=compute_dtype,
            meta_dtype=layer.scale.dtype,
            device="meta",
            initialize=False,
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    built.state_dict_metadata = False
    # As it is stored, for the loader, which puts in one tensor after another: in words, or as
    # floats (see restore_words). Planes come after it.
    built._parameters["W_q"] = nn.Parameter(layer.W_q, requires_grad=False)
    return built


def _build_experts(
    name: str,
    expected: tuple[int, int, int],
    layer: CheckpointLayer,
    metadata: LayerMetadata,
    compute_dtype: torch.dtype,
) -> HQQExpertWeights:
    found = (layer.num_experts, metadata.out_features, metadata.in_features)
    if found != expected:
        raise ValueError(
            f"{name}: the checkpoint's weights are {list(found)}, the model's {list(expected)}"
        )
    layer.checked(metadata, name)
    metadata = replace(
        metadata,
        settings=settings_for_experts(metadata.settings),
        compute_dtype=compute_dtype,
    )
    try:
        built = HQQExpertWeights(expected[0], metadata, layer.scale.dtype, "meta")
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    built.state_dict_metadata = False
    built._parameters["W_q"] = nn.Parameter(layer.W_q, requires_grad=False)
    return built


def _as_configured(
    model: Any, config: HqqConfig, dtype: torch.dtype
) -> dict[str, CheckpointLayer]:
    """For a state_dict without files: the layers that the configuration means."""
    settings_of = LayerSettings(config)
    tied = tied_modules(model)
    layers = {}
    for name, dense in model.named_modules():
        if type(dense) is not nn.Linear or name in tied:
            continue
        if settings_of.for_layer(name) is None:
            continue
        shape = (dense.out_features, dense.in_features)
        metadata = _configured_metadata(name, shape, settings_of, dtype)
        layer = HQQLinear(
            dense,
            metadata.settings.to_config(),
            compute_dtype=dtype,
            device="meta",
            initialize=False,
        )
        layer.repack(planes=False)
        layers[name] = CheckpointLayer(layer.W_q, layer.scale, layer.zero, dense.bias, metadata)
    for name, module, weight in expert_parameters(model):
        if settings_of.for_layer(name) is None:
            continue
        shape = matrix_shape(module, weight)
        metadata = _configured_metadata(name, shape, settings_of, dtype)
        metadata = replace(metadata, settings=settings_for_experts(metadata.settings))
        stack = HQQExpertWeights(weight.size(0), metadata, dtype, "meta")
        stack.repack(planes=False)
        layers[name] = CheckpointLayer(stack.W_q, stack.scale, stack.zero, None, metadata)
    return layers


def _configured_metadata(
    name: str, shape: tuple[int, int], settings_of: LayerSettings, dtype: torch.dtype
) -> LayerMetadata:
    settings = settings_of.for_layer(name)
    if settings is None:
        raise ValueError(
            f"{name} is quantized in the checkpoint, which has no metadata of it, and the "
            f"configuration says nothing about it"
        )
    settings.group_size_for(*shape, name)
    return LayerMetadata(settings, *shape, dtype)


def _refuse_experts(model: nn.Module, stored: str) -> None:
    """ValueError if the layer `stored` is an expert that the model has as part of a 3-D
    parameter: transformers would start with random experts."""
    parts = stored.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            module = model.get_submodule(".".join(parts[:end]))
        except AttributeError:
            continue
        if any(p.dim() == 3 for p in module.parameters(recurse=False)):
            _refuse_expert(model, stored)
        return


def _refuse_expert(model: nn.Module, stored: str) -> NoReturn:
    raise ValueError(
        f"{stored}: the checkpoint has one quantized layer for each expert, but "
        f"{type(model).__name__} has all experts in one tensor: quantize the dense "
        f"checkpoint anew"
    )


def _check_complete(
    model: nn.Module,
    layers: Mapping[str, HQQLinear | HQQExpertWeights],
    names: ModelNames,
    contents: CheckpointContents,
) -> None:
    """ValueError if the checkpoint has quantized layers of a kind, but not all of them. (What
    it has not at all, such as a new classifier, transformers initialises and reports.)"""
    kinds = {linear_tag(name): name for name in layers}
    weights = {n: f"{n}.weight" for n, m in model.named_modules() if type(m) is nn.Linear}
    weights.update((name, name) for name, *_ in expert_parameters(model))
    suspects = [name for name in weights if name not in layers and linear_tag(name) in kinds]
    if not suspects:
        return
    dense = {names.key(key) for key in contents.other_keys}
    for name in suspects:
        if weights[name] not in dense:
            raise ValueError(
                f"{name}: the checkpoint has no such layer, but it has "
                f"{kinds[linear_tag(name)]}"
            )
