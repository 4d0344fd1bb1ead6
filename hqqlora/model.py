"""Quantizing a model's linear layers in place, and putting adapters on them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hqqlora.expert_weights import HQQExpertWeights
from hqqlora.experts import is_projection, quantize_experts
from hqqlora.layers_to_quantize import layers_to_quantize
from hqqlora.linear import HQQLinear
from hqqlora.lora import LoRALinear
from hqqlora.lora_experts import LoRAExpertWeights
from hqqlora.module_names import ALL_LINEAR, check_pattern, is_target, pattern_value, unwrapped

# Modules with a frozen quantized weight, and those with a trained adapter around one.
Quantized = HQQLinear | HQQExpertWeights
Adapted = LoRALinear | LoRAExpertWeights


def quantize_model(
    model: nn.Module,
    config: Mapping[str, Any],
    skip_modules: Sequence[str] = ("lm_head",),
    compute_dtype: torch.dtype | None = None,
    meta_dtype: torch.dtype | None = None,
    progress: bool = True,
    device: torch.device | str | int | None = None,
    *,
    importance: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Replaces every nn.Linear of `model` by an `HQQLinear`, in place, and every projection of
    a transformers experts module, which is a 3-D parameter, by an `HQQExpertWeights`.

    Layers go one after another, and each dense weight is freed before the next is touched, so
    that memory never exceeds the model and one layer. Layers already quantized stay as they
    are: a second call, or one after an interruption, does what is left.

        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> model = quantize_model(model, BaseQuantizeConfig(nbits=4), progress=False)
        >>> type(model[0]).__name__
        'HQQLinear'

    A transformers model can be saved with `save_pretrained` afterwards, and loaded with
    `from_pretrained` (see `hqqlora.transformers.mark_quantized`).

    Left dense: other classes than nn.Linear itself (Conv1D too), what `skip_modules` names,
    and, with a warning, weights tied to another module, which two modules would no longer
    share, and layers whose parent reads the weight itself.

    Args:
        model: on any device; its layers are quantized where they are.
        config: one configuration (see `BaseQuantizeConfig`) for all layers, or a mapping from
            name patterns to configurations. In a mapping the first pattern that matches a
            layer's name decides; None leaves the layer dense, as does no match. A pattern
            names a run of whole dot-separated parts, with the wildcards of file names:
            ``{"layers.0": None, "mlp.*_proj": three_bits, "*": four_bits}``.
        skip_modules: patterns of layers to leave dense, stronger than `config`.
        compute_dtype: of the quantized layers; None: each dense weight's own.
        meta_dtype: of scales and zeros; None: compute_dtype.
        progress: show a progress bar on stderr.
        device: where each layer is quantized and then lives; None: where it is. (What is not
            quantized stays.)
        importance: how much an error in each column of a layer counts, by the layers' names, as
            `input_importance` gives it, for solver "default"; layers it does not name, and
            experts, are quantized without. None: none.

    Returns:
        model.

    Raises:
        ValueError: nothing is there to quantize; or, before anything is changed, a group size
            does not divide a weight, naming the layer; or a weight is not finite, naming layer
            and element, when the layers before it are already quantized.
        TypeError: model is itself an nn.Linear (use `HQQLinear`).
    """
    if type(model) is nn.Linear:
        raise TypeError("model is itself an nn.Linear: use HQQLinear(model, config)")
    plan = layers_to_quantize(model, config, tuple(skip_modules))
    given = importance or {}
    for name in tqdm(list(plan), desc="quantizing", unit="layer", disable=not progress):
        places, settings = plan.pop(name)
        try:
            if is_projection(model, name):
                quantize_experts(
                    model,
                    name,
                    settings.to_config(),
                    compute_dtype,
                    device,
                    meta_dtype=meta_dtype,
                )
                continue
            dense = model.get_submodule(name)
            assert isinstance(dense, nn.Linear)
            quantized: nn.Module = HQQLinear(
                dense,
                settings.to_config(),
                compute_dtype=compute_dtype or dense.weight.dtype,
                meta_dtype=meta_dtype,
                device=device,
                importance=next((given[place] for place in places if place in given), None),
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        for place in places:
            model.set_submodule(place, quantized)
    _tell_transformers(model)
    return model


def add_lora(
    model: nn.Module,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    *,
    use_rslora: bool = False,
    lora_bias: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
    init_lora_weights: bool | str = True,
) -> nn.Module:
    """Puts a `LoRALinear` around quantized layers of `model`, and a `LoRAExpertWeights`, an
    adapter for each expert, around quantized experts, in place; and freezes the rest.

        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> model = quantize_model(model, BaseQuantizeConfig(nbits=4), progress=False)
        >>> model = add_lora(model, r=8, lora_alpha=16)
        >>> # A [8, 64] and B [64, 8]
        >>> sum(parameter.numel() for parameter in lora_parameters(model))
        1024

    Args:
        model: with quantized layers (see `quantize_model`).
        r, lora_alpha, lora_dropout, use_rslora, lora_bias, dtype, init_lora_weights: of each
            `LoRALinear`.
        target_modules: as in PEFT. "all-linear": every quantized layer but the model's output
            layer; another string: a regular expression for whole names; a list: names or their
            last parts, such as ["q_proj", "v_proj"].
        rank_pattern, alpha_pattern: as in PEFT: other ranks or alphas for the layers whose
            name, from the beginning or from a dot on, matches the regular expression.

    Returns:
        model.

    Raises:
        ValueError: no layer is meant, a layer has an adapter already, or a layer that is meant
            is not quantized; or a string is not a regular expression; nothing is changed.
    """
    names = _targets(model, target_modules)
    for argument, patterns in (
        ("rank_pattern", rank_pattern),
        ("alpha_pattern", alpha_pattern),
    ):
        for pattern in patterns or {}:
            check_pattern(pattern, argument)
    adapters = []
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, Quantized)
        adapter = adapter_for(
            base,
            pattern_value(unwrapped(name), rank_pattern or {}, r),
            pattern_value(unwrapped(name), alpha_pattern or {}, lora_alpha),
            lora_dropout,
            use_rslora=use_rslora,
            lora_bias=lora_bias,
            dtype=dtype,
            init_lora_weights=init_lora_weights,
        )
        adapters.append(adapter.train(base.training))
    insert_adapters(model, adapters)
    return model


def adapter_for(base: Quantized, *arguments: Any, **options: Any) -> Adapted:
    """A new adapter around `base`; the arguments are those of `LoRALinear`."""
    if isinstance(base, HQQExpertWeights):
        return LoRAExpertWeights(base, *arguments, **options)
    return LoRALinear(base, *arguments, **options)


def insert_adapters(model: nn.Module, adapters: Iterable[Adapted]) -> None:
    """Puts each adapter in the place of its base, wherever that is in `model`, and leaves
    nothing trainable but adapters."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    of_base = {id(adapter.base_layer): adapter for adapter in adapters}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in of_base:
            model.set_submodule(name, of_base[id(module)])
    for parameter in lora_parameters(model):
        parameter.requires_grad_(True)


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters to train: A, B and bias of every adapter in `model`, each once."""
    for _, adapter in lora_layers(model):
        yield adapter.lora_A
        yield adapter.lora_B
        if adapter.lora_bias is not None:
            yield adapter.lora_bias


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """The names and modules of every `LoRALinear` and `LoRAExpertWeights` in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            yield name, module


def _tell_transformers(model: nn.Module) -> None:
    """Makes a transformers model one that `save_pretrained` can write."""
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        from hqqlora.transformers import mark_quantized

        mark_quantized(model)


# ---- which layers get an adapter ---------------------------------------------------------


def _targets(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        return _all_linear(model)
    names = []
    for name, module in model.named_modules():
        try:
            meant = is_target(unwrapped(name), target_modules)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"target_modules={target_modules!r} is not a regular expression: {error}"
            ) from error
        if not meant:
            continue
        if isinstance(module, Adapted):
            raise ValueError(f"{name} has an adapter already")
        if isinstance(module, Quantized):
            names.append(name)
        elif isinstance(module, nn.Linear):
            raise ValueError(f"{name} is not quantized: only quantized layers take adapters")
    if not names:
        raise ValueError(f"target_modules={target_modules!r} means no quantized layer")
    return names


def _all_linear(model: nn.Module) -> list[str]:
    find_output = getattr(model, "get_output_embeddings", None)
    output = find_output() if callable(find_output) else None
    names = []
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            raise ValueError(f"{name} has an adapter already")
        if isinstance(module, Quantized) and module is not output:
            names.append(name)
    if not names:
        raise ValueError("no layer is quantized: call quantize_model first")
    if names == [""]:
        raise ValueError("model is itself an HQQLinear: use LoRALinear(model)")
    return names
