"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
import reprlib
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hqqlora.files import creating_folder, write_json, write_safetensors
from hqqlora.linear import HQQLinear
from hqqlora.lora import LoRALinear
from hqqlora.model import check_pattern, insert_adapters, lora_layers
from hqqlora.module_names import pattern_value, unwrapped

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."

# What a LoRA of PEFT's may have that an adapter here has not, and the value that means "not".
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_NAMES = {"use_dora": "DoRA", "use_qalora": "QALoRA"}


@dataclass(frozen=True)
class _Factors:
    A: Tensor
    B: Tensor
    bias: Tensor | None


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    base_model_name_or_path: str | None = None,
) -> None:
    """Saves the adapters of `model` so that `load_adapter`, PEFT and what reads PEFT's files
    load them. The files appear as a whole or not at all.

    Args:
        model: with at least one `LoRALinear`; merged or not.
        folder: created if need be; files of an earlier adapter in it are replaced.
        base_model_name_or_path: what the adapter belongs on, for the reader to find it. None:
            what the model says of itself (transformers' `name_or_path`).

    Raises:
        ValueError: model has no adapter, or adapters that one PEFT configuration cannot
            describe (dropout, rsLoRA and lora_bias must be the same in all).
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
    with creating_folder(folder) as place:
        write_safetensors(place / WEIGHTS_FILE, _tensors_of(layers))
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
    config = _read_config(Path(folder))
    factors = _read_factors(Path(folder), config)
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


def _tensors_of(layers: Mapping[str, LoRALinear]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        prefix = PREFIX + (name + "." if name else "")
        tensors[prefix + "lora_A.weight"] = layer.lora_A
        tensors[prefix + "lora_B.weight"] = layer.lora_B
        if layer.lora_bias is not None:
            tensors[prefix + "lora_B.bias"] = layer.lora_bias
    return tensors


def _config_of(
    model: nn.Module, layers: Mapping[str, LoRALinear], base: str | None
) -> dict[str, Any]:
    r = Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.lora_alpha for layer in layers.values()).most_common(1)[0][0]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": _task_type(model),
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
    if any(layer.lora_bias is not None for layer in layers.values()):
        if any(layer.lora_bias is None for layer in layers.values()):
            raise ValueError("lora_bias differs between layers; PEFT's format has one for all")
        config["lora_bias"] = True  # left out otherwise: older versions of PEFT do not know it
    return config


def _key(name: str) -> str:
    """A pattern for PEFT that matches this module's name and no other."""
    return "^" + name.replace(".", r"\.")


def _common(layers: Mapping[str, LoRALinear], attribute: str) -> Any:
    values = {getattr(layer, attribute) for layer in layers.values()}
    if len(values) > 1:
        raise ValueError(
            f"{attribute} differs between layers ({sorted(values)}); "
            f"PEFT's format has one for all"
        )
    return values.pop()


def _task_type(model: nn.Module) -> str | None:
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return "CAUSAL_LM" if causal and hasattr(model, "prepare_inputs_for_generation") else None


def _target_modules(model: nn.Module, layers: Mapping[str, LoRALinear]) -> list[str]:
    """The last parts of the names, such as "q_proj", if those mean no other module; otherwise
    the full names."""
    last_parts = {name.rpartition(".")[2] for name in layers}
    inside = tuple(name + "." for name in layers)
    others = (
        name
        for name in (unwrapped(name) for name, _ in model.named_modules())
        if name not in layers and not name.startswith(inside)
    )
    if any(name.rpartition(".")[2] in last_parts for name in others):
        return sorted(layers)
    return sorted(last_parts)


# ---- reading -----------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no text, no JSON, or nested too deep
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}, not 'LORA'")
    for key, harmless in _UNSUPPORTED.items():
        if config.get(key) not in harmless:
            name = _NAMES.get(key, f"{key}={config[key]!r}")
            raise ValueError(f"{path}: {name} is not supported, only plain LoRA and rsLoRA are")
    _check_numbers(config, path)
    return config


def _check_numbers(config: Mapping[str, Any], path: Path) -> None:
    """The types of what the layers are made from; their ranges `LoRALinear` checks."""
    _check_number(config.get("r"), True, f"{path}: r")
    _check_number(config.get("lora_alpha"), False, f"{path}: lora_alpha")
    if config.get("lora_dropout") is not None:
        _check_number(config["lora_dropout"], False, f"{path}: lora_dropout")
    for key in ("use_rslora", "lora_bias"):
        if config.get(key) not in (True, False, None):
            raise ValueError(f"{path}: {key} is {config[key]!r}, not true or false")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key)
        if patterns is None:
            continue
        if not isinstance(patterns, dict):
            raise ValueError(f"{path}: {key} is {patterns!r}, not a JSON object")
        for pattern, value in patterns.items():
            check_pattern(pattern, f"{path}: {key}")
            _check_number(value, key == "rank_pattern", f"{path}: {key} of {pattern!r}")


def _check_number(value: Any, whole: bool, what: str) -> None:
    """A finite number; `whole`: one without a fraction, though it may be written 8.0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{what} is {reprlib.repr(value)}, not a number")
    if whole and value != int(value):
        raise ValueError(f"{what} is {value!r}, not a whole number")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # which ones a damaged file leads to, no reader says
        raise ValueError(f"{path} cannot be read, it may be damaged: {error}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, not named tensors")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {key!r} is a {type(tensor).__name__}, not a tensor")
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(
                f"{path}: {key} is {tensor.dtype}, {tensor.layout} on {tensor.device}, not a "
                f"dense tensor of floating-point numbers"
            )
    return tensors


def _read_factors(folder: Path, config: Mapping[str, Any]) -> dict[str, _Factors]:
    path = folder / WEIGHTS_FILE
    if not path.exists() and (folder / PICKLE_FILE).exists():
        path = folder / PICKLE_FILE
    tensors = _read_tensors(path)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for suffix in (".lora_A.weight", ".lora_B.weight", ".lora_B.bias"):
            if key.startswith(PREFIX) and key.endswith(suffix):
                name = key[len(PREFIX) : -len(suffix)]
                found.setdefault(name, {})[suffix] = tensor
                break
        else:
            raise ValueError(f"{path}: {key!r} is not part of a plain LoRA adapter")
    factors = {}
    for name, parts in found.items():
        if ".lora_A.weight" not in parts or ".lora_B.weight" not in parts:
            raise ValueError(f"{path}: {name} has only one of lora_A and lora_B")
        bias = parts.get(".lora_B.bias")
        if (bias is not None) != bool(config.get("lora_bias", False)):
            raise ValueError(f"{path}: {name} and the configuration disagree on lora_bias")
        factors[name] = _Factors(parts[".lora_A.weight"], parts[".lora_B.weight"], bias)
    if not factors:
        raise ValueError(f"{path} holds no adapter")
    return factors


@torch.no_grad()
def _copy(pair: _Factors, adapter: LoRALinear) -> None:
    adapter.lora_A.copy_(pair.A)
    adapter.lora_B.copy_(pair.B)
    if adapter.lora_bias is not None and pair.bias is not None:
        adapter.lora_bias.copy_(pair.bias)


def _fit(
    module: nn.Module | None,
    name: str,
    pair: _Factors,
    config: Mapping[str, Any],
    dtype: torch.dtype,
) -> LoRALinear:
    """The layer that takes the factors: the model's own LoRALinear, or a new one around its
    HQQLinear. Does not change the model."""
    if module is None:
        raise ValueError(f"the model has no module {name!r} for the adapter")
    r = int(pattern_value(name, config.get("rank_pattern") or {}, config["r"]))
    alpha = pattern_value(name, config.get("alpha_pattern") or {}, config["lora_alpha"])
    if isinstance(module, HQQLinear):
        adapter = LoRALinear(
            module,
            r,
            alpha,
            config.get("lora_dropout") or 0.0,
            use_rslora=bool(config.get("use_rslora", False)),
            lora_bias=pair.bias is not None,
            dtype=dtype,
        ).train(module.training)
    elif isinstance(module, LoRALinear):
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
    for factor, tensor, shape in (
        ("lora_A", pair.A, adapter.lora_A.shape),
        ("lora_B", pair.B, adapter.lora_B.shape),
        ("lora_B.bias", pair.bias, (adapter.out_features,)),
    ):
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{name}: {factor} is {list(tensor.shape)}, but the layer and r={r} call for "
                f"{list(shape)}"
            )
    return adapter
