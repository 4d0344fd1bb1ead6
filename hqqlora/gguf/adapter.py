"""A LoRA adapter as a GGUF file that llama.cpp adds to a model as it loads it."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqqlora.adapter_files import Factors, read_config, read_factors
from hqqlora.adapters import save_adapter
from hqqlora.base_model import without_peft
from hqqlora.gguf.architectures import (
    architecture_of_config,
    stored_order,
    tensor_names,
)
from hqqlora.gguf.container import NewTensor, Value, import_gguf, write_gguf
from hqqlora.model import lora_layers
from hqqlora.module_names import pattern_value

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def export_gguf_adapter(
    adapter: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    base: Any = None,
    *,
    type: str = "F32",
) -> None:
    """Writes a LoRA adapter as a GGUF file. The file appears as a whole or not at all.

    llama.cpp scales every layer by one alpha / r. Where a layer's own scaling is another
    (alpha_pattern, rsLoRA) its B is multiplied by the quotient. The rows of B are put into the
    order in which GGUF has the rows of the layer.

    Args:
        adapter: a model with `LoRALinear` layers; PEFT's model around one, whose active adapter
            is meant; or a folder that `save_adapter` or PEFT has written.
        path: replaced if it exists.
        base: what the adapter belongs on, a transformers model or its configuration. None: the
            model itself; needed with a folder.
        type: of the factors: "F32", "F16" or "BF16".

    Raises:
        ValueError: the adapter is no plain LoRA, has a bias, sits on something GGUF has no name
            for, does not fit the base, or the base's type is not supported. Nothing is written.
        FileNotFoundError: a file of the folder is missing.
        OSError: the file cannot be written; names it.
        ImportError: the package gguf is missing.
    """
    import_gguf()
    if type not in _TYPES:
        raise ValueError(f"type={type!r} is not one of {', '.join(_TYPES)}")
    if base is None:
        if not isinstance(adapter, nn.Module):
            raise ValueError("base is needed to export an adapter from a folder")
        base = adapter
    if isinstance(adapter, nn.Module):
        with tempfile.TemporaryDirectory(prefix="hqqlora-") as folder:
            config, factors = _read(_saved(adapter, Path(folder)))
    else:
        config, factors = _read(Path(adapter))
    base_config = getattr(base, "config", base)
    architecture = architecture_of_config(base_config)
    alpha, scaled = _one_alpha(config, factors)
    values = {
        "general.type": Value("STRING", "adapter"),
        "adapter.type": Value("STRING", "lora"),
        "adapter.lora.alpha": Value("FLOAT32", alpha),
    }
    translate = tensor_names(architecture, base_config.num_hidden_layers)
    tensors = []
    for module, pair in scaled.items():
        _check_shape(module, pair, base)
        name = translate(f"{module}.weight")
        if name is None:
            raise ValueError(f"GGUF has no name for the weight of {module}")
        reorder = stored_order(architecture, name, base_config)
        B = pair.B if reorder is None else reorder(pair.B)
        tensors += [_tensor(f"{name}.lora_a", pair.A, type), _tensor(f"{name}.lora_b", B, type)]
    write_gguf(path, architecture.name, values, tensors)


def _saved(model: nn.Module, folder: Path) -> Path:
    """A folder with the adapter of a model, in PEFT's format."""
    if next(lora_layers(model), None) is not None:
        save_adapter(model, folder)
        return folder
    peft_config = getattr(model, "peft_config", None)
    save = getattr(model, "save_pretrained", None)
    if not isinstance(peft_config, Mapping) or save is None:
        raise ValueError("the model has no adapter: neither a LoRALinear nor one of PEFT's")
    active = model.active_adapter
    save(folder, selected_adapters=[active], save_embedding_layers=False)
    return folder if active == "default" else folder / str(active)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Factors]]:
    config = read_config(folder)
    factors = read_factors(folder, config)
    for module, pair in factors.items():
        if pair.bias is not None:
            raise ValueError(f"{module} has a lora_bias, which a GGUF adapter cannot have")
    return config, factors


def _one_alpha(
    config: Mapping[str, Any], factors: Mapping[str, Factors]
) -> tuple[float, dict[str, Factors]]:
    """The alpha of most layers, and factors whose product times alpha / r is what it was."""
    alphas = {}
    for module, pair in factors.items():
        r = pair.A.size(0)
        alpha = pattern_value(module, config.get("alpha_pattern") or {}, config["lora_alpha"])
        alphas[module] = float(alpha) * (r**0.5 if config.get("use_rslora") else 1.0)
    common = Counter(alphas.values()).most_common(1)[0][0]
    if common == 0:  # llama.cpp takes an alpha of 0 for none
        common = max(alphas.values()) or 1.0
    return common, {
        module: pair
        if alphas[module] == common
        else Factors(pair.A, pair.B.double() * (alphas[module] / common), None)
        for module, pair in factors.items()
    }


def _check_shape(module: str, pair: Factors, base: Any) -> None:
    """Compares the factors with the layer, where there is a model to ask."""
    r = pair.A.size(0) if pair.A.dim() == 2 else -1
    found = (list(pair.B.shape), list(pair.A.shape))
    layer = None
    if isinstance(base, nn.Module):
        try:
            layer = without_peft(base).get_submodule(module)
        except AttributeError:
            raise ValueError(f"the base has no module {module!r} for the adapter") from None
    N = layer.out_features if layer is not None else pair.B.size(0)
    K = layer.in_features if layer is not None else pair.A.size(-1)
    if found != ([N, r], [r, K]):
        raise ValueError(
            f"{module}: lora_B and lora_A are {found[0]} and {found[1]}, but the layer is "
            f"[{N}, {K}]"
        )


def _tensor(name: str, factor: Tensor, kind: str) -> NewTensor:
    def make() -> Tensor:
        numbers = factor.detach().cpu().to(_TYPES[kind]).contiguous()
        return numbers.view(torch.uint8)

    return NewTensor(name, kind, tuple(factor.shape), make)
