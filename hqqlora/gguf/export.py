"""From a quantized transformers model to a GGUF file that llama.cpp runs."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hqqlora.base_model import without_peft
from hqqlora.gguf.architectures import (
    Architecture,
    architecture_of_config,
    plain_name,
    stored_order,
    tensor_names,
)
from hqqlora.gguf.container import NewTensor, Value, import_gguf, write_gguf
from hqqlora.gguf.encode import DENSE_TYPES, Rounding, encode_dense, encode_layer
from hqqlora.gguf.rope import FREQUENCY_FACTORS, values_of_config
from hqqlora.gguf.tokenizer import source_of, tokenizer_values
from hqqlora.linear import HQQLinear

# llama.cpp's numbers for "most of this file is of type".
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
_QUANTIZATION_VERSION = 2


def export_gguf(
    model: nn.Module,
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    dense_type: str | None = None,
    requantize: bool = False,
    name: str | None = None,
) -> None:
    """Writes a model as one GGUF file. The file appears as a whole or not at all.

    Quantized layers keep their codes. Layers of 4 bits or fewer, of axis 1 and groups of a
    multiple of 32, become Q4_1 (Q4_0 if every zero is 8): scale and scale * zero are rounded to
    fp16, by at most 2^-11 of each; a group of 64 becomes two blocks. 8-bit layers become Q8_0,
    which has no zeros: unless every zero is 128 their weights are rounded anew, and a warning
    says by how much. What `load_gguf` has read as Q4_0, Q4_1 or Q8_0 is written byte for byte.

    An adapter that is not merged is not in the file, and a warning says so: merge it, or write
    it with `export_gguf_adapter`.

    Args:
        model: a transformers causal language model of type llama, mistral, qwen2 or qwen3, or
            PEFT's model around one.
        path: replaced if it exists.
        tokenizer: a fast tokenizer of transformers' (byte-level BPE), or the path of a GGUF
            file of the same model to copy it from. None: the file that `load_gguf` has read.
        dense_type: of embeddings and dense layers: "F32", "F16", "BF16" or "Q8_0". None: BF16
            for bfloat16 parameters, F16 for others. Vectors are F32 always.
        requantize: round layers that no block type holds (axis 0, groups of 16, ...) to Q8_0.
        name: of the model, for llama.cpp to show. None: its `name_or_path`.

    Raises:
        ValueError: the model's type is not supported, or a layer does not fit; names the layer
            and what to do. Nothing is written.
        OSError: the file cannot be written; names it.
        ImportError: the package gguf is missing.
    """
    import_gguf()
    if dense_type is not None and dense_type not in DENSE_TYPES:
        raise ValueError(f"dense_type={dense_type!r} is not one of {', '.join(DENSE_TYPES)}")
    model = without_peft(model)
    config: Any = model.config
    architecture = architecture_of_config(config)
    if tokenizer is None:
        tokenizer = source_of(model)
        if tokenizer is None:
            raise ValueError("a tokenizer is needed for a model that load_gguf has not read")
    _warn_of_adapters(model)
    rounding = Rounding()
    tensors = list(_tensors(model, architecture, dense_type, requantize, rounding))
    values = _model_values(
        config, architecture, name or str(getattr(model, "name_or_path", ""))
    )
    rope, factors = values_of_config(
        config.rope_parameters, architecture.name, _head_dim(config)
    )
    if factors is not None:
        tensors.append(encode_dense(FREQUENCY_FACTORS, FREQUENCY_FACTORS, factors, None, "F32"))
    values.update(rope)
    values.update(_file_type(tensors))
    values.update(tokenizer_values(tokenizer, config.vocab_size))
    write_gguf(path, architecture.name, values, tensors)
    if rounding.layers:
        warnings.warn(
            f"{len(rounding.layers)} layers were rounded anew to Q8_0, which has no zeros; "
            f"weights moved by at most {rounding.largest:.3g} (in {rounding.largest_in})",
            stacklevel=2,
        )


# ---- tensors -----------------------------------------------------------------------------


def _tensors(
    model: Any,
    architecture: Architecture,
    dense_type: str | None,
    requantize: bool,
    rounding: Rounding,
) -> Iterator[NewTensor]:
    translate = tensor_names(architecture, model.config.num_hidden_layers)
    for module_name, module in model.named_modules():
        if _is_adapter(module_name):
            continue
        for key, parameter in _parameters(module):
            full_name = f"{module_name}.{key}"
            if _tied(model, full_name, parameter):
                continue
            name = translate(full_name)
            if name is None:
                raise ValueError(f"GGUF has no name for the parameter {full_name}")
            reorder = stored_order(architecture, name, model.config)
            if isinstance(module, HQQLinear) and key == "weight":
                layer = plain_name(module_name)
                yield encode_layer(name, layer, module, reorder, requantize, rounding)
            else:
                yield encode_dense(name, full_name, parameter, reorder, dense_type)


def _parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters; of a quantized layer weight and bias."""
    if isinstance(module, HQQLinear):
        yield "weight", module.weight
        if module.bias is not None:
            yield "bias", module.bias
        return
    for key, parameter in module.named_parameters(recurse=False):
        if not key.startswith("lora_"):
            yield key, parameter


def _is_adapter(module_name: str) -> bool:
    return any(part.startswith("lora_") for part in module_name.split("."))


def _tied(model: Any, name: str, parameter: Tensor) -> bool:
    """Whether it is the output layer's weight, and the embedding's: then GGUF has it once."""
    if parameter is not getattr(model.get_input_embeddings(), "weight", None):
        return False
    return model.get_output_embeddings() is model.get_submodule(name.rpartition(".")[0])


def _warn_of_adapters(model: nn.Module) -> None:
    """Our layers and PEFT's both tell whether they are merged."""
    names = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer") and not module.merged
    ]
    if names:
        warnings.warn(
            f"{len(names)} adapters, such as that of {plain_name(names[0])}, are not merged "
            f"and not in the file: write them with export_gguf_adapter",
            stacklevel=3,
        )


# ---- values ------------------------------------------------------------------------------


def _head_dim(config: Any) -> int:
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


def _model_values(config: Any, architecture: Architecture, name: str) -> dict[str, Value]:
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": _head_dim(config),
        "attention.value_length": _head_dim(config),
        "rope.dimension_count": _head_dim(config),
        "vocab_size": config.vocab_size,
    }
    values = {
        "general.type": Value("STRING", "model"),
        "general.quantization_version": Value("UINT32", _QUANTIZATION_VERSION),
    }
    if name:
        values["general.name"] = Value("STRING", os.path.basename(os.path.normpath(name)))
    for key, number in numbers.items():
        values[f"{architecture.name}.{key}"] = Value("UINT32", int(number))
    values[f"{architecture.name}.attention.layer_norm_rms_epsilon"] = Value(
        "FLOAT32", float(config.rms_norm_eps)
    )
    return values


def _file_type(tensors: list[NewTensor]) -> dict[str, Value]:
    """The type of most weights."""
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[tensor.type] += torch.Size(tensor.shape).numel()
    kind = weights.most_common(1)[0][0]
    return {"general.file_type": Value("UINT32", _FILE_TYPES[kind])}
