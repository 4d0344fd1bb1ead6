"""Which linear layers of a model an HqqConfig means, and how each is to be quantized."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hqqlora.config import QuantSettings
from hqqlora.experts import expert_parameters, matrix_shape, settings_for_experts
from hqqlora.layers_to_quantize import tied_weights, warn_of_unknown_stacks, why_left_dense
from hqqlora.module_names import linear_tag, matches
from hqqlora.state_encoding import LayerMetadata
from hqqlora.transformers.config import HqqConfig, is_per_key

# What "attn" as a key stands for: attention has many names.
_ATTENTION = ("*attn*", "*attention*", "*Attention*")


class LayerSettings:
    """The settings that a configuration has for each layer."""

    def __init__(self, config: HqqConfig) -> None:
        """Reads `config`, which has been checked."""
        quant_config = config.quant_config
        per_key = is_per_key(quant_config)
        self._skip_modules = tuple(config.skip_modules)
        self._of_key: dict[str, QuantSettings | None] = {
            key: None if value is None else QuantSettings.parse(value)
            for key, value in (quant_config if per_key else {"*": quant_config}).items()
        }
        self._per_key = per_key

    def for_layer(self, name: str) -> QuantSettings | None:
        """How to quantize the layer `name`; None: not at all."""
        for exact in (name, linear_tag(name)):
            if self._per_key and exact in self._of_key:
                return self._of_key[exact]
        if any(_means(key, name) for key in self._skip_modules):
            return None
        return next((s for key, s in self._of_key.items() if _means(key, name)), None)

    def check_keys(self, names: Iterable[str], model: str) -> None:
        """ValueError if a key of dynamic_config means none of the layers `names`."""
        names = list(names)
        for key in self._of_key if self._per_key else ():
            if not any(_means(key, name) for name in names):
                raise ValueError(
                    f"dynamic_config[{key!r}] means no linear layer of {model}; it has "
                    f"{sorted({linear_tag(name) for name in names})}"
                )


def layers_to_quantize(
    model: Any, config: HqqConfig, dtype: torch.dtype
) -> dict[str, QuantSettings]:
    """For each layer to quantize, and each projection of experts, its name and how. `model`
    may be on the meta device.

    Raises:
        ValueError: there is none; a key of the configuration means no layer; or a group size
            or view_as_float does not fit a layer, naming it.
    """
    settings_of = LayerSettings(config)
    tied = tied_modules(model)
    shared = tied_weights(model)
    plan: dict[str, QuantSettings] = {}
    linear = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.Linear
    ]
    experts = list(expert_parameters(model))
    names = [name for name, _ in linear] + [name for name, _, _ in experts]
    settings_of.check_keys(names, type(model).__name__)
    places = Counter(id(module) for _, module in linear)
    for name, module in linear:
        settings = settings_of.for_layer(name)
        if settings is None:
            continue
        reason = why_left_dense(model, name, module, shared)
        if name in tied:
            reason = f"its weight is tied to {tied[name]}"
        elif places[id(module)] > 1:
            reason = f"it is in the model under {places[id(module)]} names"
        if reason:
            warnings.warn(f"{name} stays dense: {reason}", stacklevel=2)
            continue
        _check_shape(name, module, settings, dtype)
        plan[name] = settings
    for name, owner, parameter in experts:
        settings = settings_of.for_layer(name)
        if settings is not None:
            settings.group_size_for(*matrix_shape(owner, parameter), name)
            plan[name] = settings_for_experts(settings)
    warn_of_unknown_stacks(model)
    if not plan:
        raise ValueError(
            f"no layer of {type(model).__name__} is to be quantized: none is an nn.Linear that "
            f"the configuration means and skip_modules={config.skip_modules} does not"
        )
    return plan


def tied_modules(model: Any) -> dict[str, str]:
    """The names of modules whose weight transformers ties to another's -> that other's."""
    pairs: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    names: dict[str, str] = {}
    for target, source in pairs.items():
        for mine, other in ((target, source), (source, target)):
            names.setdefault(mine.removesuffix(".weight"), other)
    return names


def _means(key: str, name: str) -> bool:
    patterns = (*_ATTENTION, key) if key == "attn" else (key,)
    return any(matches(n, p) for n in (name, linear_tag(name)) for p in patterns)


def _check_shape(
    name: str, module: nn.Linear, settings: QuantSettings, dtype: torch.dtype
) -> None:
    N, K = module.out_features, module.in_features
    settings.group_size_for(N, K, name)
    if settings.view_as_float:
        try:
            LayerMetadata(settings, N, K, dtype).check_float_view()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
