"""Reading an adapter from PEFT's files, all of it checked."""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hqqlora.module_names import check_pattern
from hqqlora.pattern_cost import check_cost
from hqqlora.torch_files import read_torch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
# Where `hqqlora quantize --correction` puts an adapter, in the folder of the quantized model.
CORRECTION_FOLDER = "correction"

# What a LoRA of PEFT's may have that an adapter here has not, and the value that means "not".
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
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
class Factors:
    """One layer's A [r, in_features], B [out_features, r] and bias [out_features]."""

    A: Tensor
    B: Tensor
    bias: Tensor | None


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration in `folder`.

    Raises:
        ValueError: it is damaged, or of an adapter that is not plain LoRA.
        OSError: it cannot be read.
    """
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
    targets = config.get("target_parameters")
    if targets is not None and not (
        isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    ):
        raise ValueError(f"{path}: target_parameters is {targets!r}, not a list of names")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key)
        if patterns is None:
            continue
        if not isinstance(patterns, dict):
            raise ValueError(f"{path}: {key} is {patterns!r}, not a JSON object")
        for pattern, value in patterns.items():
            check_cost(pattern, f"{path}: {key}")
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
        tensors = load_file(path) if path.suffix == ".safetensors" else read_torch(path)
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


def read_factors(folder: Path, config: Mapping[str, Any]) -> dict[str, Factors]:
    """The weights in `folder`: the name of a module -> its factors.

    Raises:
        ValueError: the file is damaged, or does not fit `config`.
        OSError: it cannot be read.
    """
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
        factors[name] = Factors(parts[".lora_A.weight"], parts[".lora_B.weight"], bias)
    if not factors:
        raise ValueError(f"{path} holds no adapter")
    return factors
