"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hqqlora.adapter_files import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    Factors,
    read_config,
    read_factors,
)
from hqqlora.expert_adapters import own_names, peft_names, target_parameters
from hqqlora.files import creating_folder, write_json, write_safetensors
from hqqlora.lora import LoRALinear
from hqqlora.lora_experts import LoRAExpertWeights
from hqqlora.model import Adapted, Quantized, adapter_for, insert_adapters, lora_layers
from hqqlora.module_names import last_parts_or_names, pattern_value, unwrapped
from hqqlora.shared_parameters import copy_whole, is_shared_out, whole_tensor


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    base_model_name_or_path: str | None = None,
) -> None:
    """Saves the adapters of `model` so that `load_adapter`, PEFT and what reads PEFT's files
    load them. The files appear as a whole or not at all.

    Args:
        model: with at least one adapter; merged or not. Those of experts are written as PEFT's
            `target_parameters`, for which PEFT has no dropout: it loads them if lora_dropout is
            0.
        folder: created if need be; files of an earlier adapter in it are replaced.
        base_model_name_or_path: what the adapter belongs on, for the reader to find it. None:
            what the model says of itself (transformers' `name_or_path`).

    Where FSDP2 or tensor parallelism has shared the adapters out, all ranks call this together,
    and the first one writes.

    Raises:
        ValueError: model has no adapter, or adapters that one PEFT configuration cannot
            describe (dropout, rsLoRA and lora_bias must be the same in all), or ones that
            DeepSpeed's ZeRO-3 has partitioned and not gathered.
        OSError: the folder cannot be written; names the file.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    layers = {unwrapped(name): layer for name, layer in lora_layers(model)}
    if not layers:
        raise ValueError("model has no LoRALinear to save")
    if base_model_name_or_path is None:
        base_model_name_or_path = getattr(model, "name_or_path", None) or None
    config = _config_of(model, layers, base_model_name_or_path)
    tensors = {key: whole_tensor(tensor, key) for key, tensor in _tensors_of(layers).items()}
    if is_shared_out(model) and torch.distributed.get_rank() > 0:
        return
    with creating_folder(folder) as place:
        write_safetensors(place / WEIGHTS_FILE, tensors)
        write_json(place / CONFIG_FILE, config)


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Loads an adapter that `save_adapter` or PEFT has saved, in place, ready to be trained on.

    A quantized layer gets a new `LoRALinear`; one that has a LoRALinear gets new values, which
    must be of the same rank and scaling. Everything else in `model` is frozen.

    Args:
        model: with quantized layers of the names the adapter was trained on.
        folder: with adapter_config.json and adapter_model.safetensors (or .bin).
        dtype: of the parameters of a new LoRALinear.

    Returns:
        model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the adapter is not a plain LoRA (DoRA and others are
            named), or it does not fit the model; nothing is changed.
    """
    config = read_config(Path(folder))
    stored = read_factors(Path(folder), config)
    names = own_names(model, stored, config)
    factors = {names[name]: pair for name, pair in stored.items()}
    modules = {unwrapped(name): module for name, module in model.named_modules()}
    adapters = {
        name: _fit(modules.get(name), name, pair, config, dtype)
        for name, pair in factors.items()
    }
    for name, adapter in adapters.items():
        _copy(factors[name], adapter)
    insert_adapters(model, [a for name, a in adapters.items() if a is not modules[name]])
    return model


# ---- writing -----------------------------------------------------------------------------


def _tensors_of(layers: Mapping[str, Adapted]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, stored in peft_names(layers).items():
        layer = layers[name]
        prefix = PREFIX + (stored + "." if stored else "")
        if isinstance(layer, LoRAExpertWeights):
            for factor, tensor in layer.peft_factors().items():
                tensors[f"{prefix}{factor}.weight"] = tensor.contiguous()
            continue
        tensors[prefix + "lora_A.weight"] = layer.lora_A
        tensors[prefix + "lora_B.weight"] = layer.lora_B
        if layer.lora_bias is not None:
            tensors[prefix + "lora_B.bias"] = layer.lora_bias
    return tensors


def _config_of(
    model: nn.Module, layers: Mapping[str, Adapted], base: str | None
) -> dict[str, Any]:
    r = Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.lora_alpha for layer in layers.values()).most_common(1)[0][0]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type(model),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": _target_modules(model, layers),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {_key(n): la.r for n, la in layers.items() if la.r != r},
        "alpha_pattern": {
            _key(n): la.lora_alpha for n, la in layers.items() if la.lora_alpha != alpha
        },
        "lora_dropout": _common(layers, "lora_dropout"),
        "use_rslora": _common(layers, "use_rslora"),
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    if parameters := target_parameters(layers):
        config["target_parameters"] = parameters
    if any(layer.lora_bias is not None for layer in layers.values()):
        if any(layer.lora_bias is None for layer in layers.values()):
            raise ValueError("lora_bias differs between layers; PEFT's format has one for all")
        config["lora_bias"] = True  # left out otherwise: older versions of PEFT do not know it
    return config


def _key(name: str) -> str:
    """A pattern for PEFT that matches this module's name and no other."""
    return "^" + name.replace(".", r"\.")


def _common(layers: Mapping[str, Adapted], attribute: str) -> Any:
    values = {getattr(layer, attribute) for layer in layers.values()}
    if len(values) > 1:
        raise ValueError(
            f"{attribute} differs between layers ({sorted(values)}); "
            f"PEFT's format has one for all"
        )
    return values.pop()


def task_type(model: nn.Module) -> str | None:
    """PEFT's word for what the model does, if there is one."""
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return "CAUSAL_LM" if causal and hasattr(model, "prepare_inputs_for_generation") else None


def _target_modules(model: nn.Module, adapted: Mapping[str, Adapted]) -> list[str]:
    """The last parts of the names, such as "q_proj", if those mean no other module; otherwise
    the full names. (Experts are no modules of their own in PEFT: see `target_parameters`.)"""
    layers = {name for name, layer in adapted.items() if isinstance(layer, LoRALinear)}
    return last_parts_or_names(layers, (unwrapped(name) for name, _ in model.named_modules()))


@torch.no_grad()
def _copy(pair: Factors, adapter: Adapted) -> None:
    if isinstance(adapter, LoRAExpertWeights):
        adapter.set_peft_factors(pair.A, pair.B)
        return
    copy_whole(adapter.lora_A, pair.A)
    copy_whole(adapter.lora_B, pair.B)
    if adapter.lora_bias is not None and pair.bias is not None:
        copy_whole(adapter.lora_bias, pair.bias)


def _fit(
    module: nn.Module | None,
    name: str,
    pair: Factors,
    config: Mapping[str, Any],
    dtype: torch.dtype,
) -> Adapted:
    """The module that takes the factors: the model's own adapter, or a new one around its
    quantized layer. Does not change the model."""
    if module is None:
        raise ValueError(f"the model has no module {name!r} for the adapter")
    r = int(pattern_value(name, config.get("rank_pattern") or {}, config["r"]))
    alpha = pattern_value(name, config.get("alpha_pattern") or {}, config["lora_alpha"])
    if isinstance(module, Quantized):
        adapter = adapter_for(
            module,
            r,
            alpha,
            config.get("lora_dropout") or 0.0,
            use_rslora=bool(config.get("use_rslora", False)),
            lora_bias=pair.bias is not None,
            dtype=dtype,
        ).train(module.training)
    elif isinstance(module, Adapted):
        adapter = module
        if adapter.merged:
            raise ValueError(f"{name} has a merged adapter: unmerge it first")
        wanted = (r, alpha, bool(config.get("use_rslora", False)), pair.bias is not None)
        held = (
            adapter.r,
            adapter.lora_alpha,
            adapter.use_rslora,
            adapter.lora_bias is not None,
        )
        if wanted != held:
            raise ValueError(
                f"{name} has an adapter with (r, lora_alpha, use_rslora, lora_bias) = {held}, "
                f"the file's is {wanted}"
            )
    else:
        raise ValueError(
            f"{name} is a {type(module).__name__}: only quantized layers take adapters"
        )
    held_factors = (
        adapter.peft_factors()
        if isinstance(adapter, LoRAExpertWeights)
        else {"lora_A": adapter.lora_A, "lora_B": adapter.lora_B}
    )
    for factor, tensor, shape in (
        ("lora_A", pair.A, held_factors["lora_A"].shape),
        ("lora_B", pair.B, held_factors["lora_B"].shape),
        ("lora_B.bias", pair.bias, (adapter.out_features,)),
    ):
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{name}: {factor} is {list(tensor.shape)}, but the layer and r={r} call for "
                f"{list(shape)}"
            )
    return adapter
