"""From a GGUF file to a transformers model whose linear layers are quantized as in the file."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hqqlora.config import BaseQuantizeConfig, QuantSettings
from hqqlora.gguf.architectures import (
    Architecture,
    architecture_of_file,
    row_order,
    tensor_names,
)
from hqqlora.gguf.blocks import FORMATS, BlockFormat
from hqqlora.gguf.configuration import read_config
from hqqlora.gguf.container import FileTensor, GGUFFile, import_gguf
from hqqlora.gguf.rope import FREQUENCY_FACTORS
from hqqlora.linear import HQQLinear
from hqqlora.optional_packages import needing
from hqqlora.packed_codes import pack_codes
from hqqlora.planes import planes_serve
from hqqlora.state_encoding import check_dtype

_DENSE = ("F32", "F16", "BF16", "F64")
# Weights that are dequantized at once where a tensor becomes dense.
_CHUNK = 2**22

RowOrder = Callable[[Tensor], Tensor]


def load_gguf(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | int = "cpu",
    quant_config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> nn.Module:
    """The causal language model in a GGUF file, to be fine-tuned as it is.

    Linear layers stored as Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or Q2_K to Q6_K become `HQQLinear`
    layers with the file's own codes: nothing is quantized again. Scales and zeros are float32,
    so that `export_gguf` gives back the same bytes (move the model with ``.to(device)``, not
    to another dtype, to keep them). Embeddings and norms become dense, as do linear layers
    that are dense in the file. The dense model is never in memory.

    transformers takes the model for one that it has quantized itself: `save_pretrained` writes
    an HQQ checkpoint. The tokenizer is in the file too:
    ``AutoTokenizer.from_pretrained(folder, gguf_file=name)``.

    Args:
        path: a file of one of the architectures llama (Llama and Mistral), qwen2 and qwen3.
        dtype: of embeddings, norms, biases and activations: float32, bfloat16 or float16.
        device: where the model is to live.
        quant_config: how to quantize linear layers of formats that HQQ cannot hold (IQ4_XS,
            MXFP4 and others); None: they become dense. Either is said in a warning.
        progress: show a progress bar on stderr.

    Returns:
        The model, in evaluation mode. Its `gguf_path` is `path`, for `export_gguf`.

    Raises:
        FileNotFoundError, OSError: there is no such file, or it cannot be read.
        ValueError: the file is truncated, damaged, of an architecture not supported, or does
            not hold the tensors that its configuration calls for; names the tensor, the found
            and the expected.
        TypeError: dtype is not one of the three.
        ImportError: transformers, accelerate or gguf is missing.
    """
    import_gguf()
    check_dtype("dtype", dtype)
    settings = None if quant_config is None else QuantSettings.parse(quant_config)
    file = GGUFFile(path)
    architecture = architecture_of_file(file)
    config = read_config(file, architecture, lambda t: dequantize(t, torch.float32))
    config.dtype = dtype
    model = _empty_model(config, file)
    places = _match(model, file, architecture)
    _warn_of_other_types(places, settings)
    # Biases first, so that a layer has its own when its weight is quantized.
    places.sort(key=lambda place: place.linear)
    for place in tqdm(places, desc="loading", unit="tensor", disable=not progress):
        _fill(model, place, settings, dtype, torch.device(device))
    model.tie_weights()
    model.to(device)  # what is left: buffers that no file holds
    model.gguf_path = str(Path(path))
    if any(isinstance(module, HQQLinear) for module in model.modules()):
        _mark_quantized(model)
    loaded: nn.Module = model.eval()
    return loaded


def _empty_model(config: Any, file: GGUFFile) -> Any:
    """The model with all its parameters on the meta device, and real buffers."""
    with needing("load_gguf"):
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
    except Exception as error:  # whatever a number that makes no sense leads to
        raise ValueError(
            f"{file.path}: no model can be made of the configuration: "
            f"{type(error).__name__}: {error}"
        ) from error
    return model


def _mark_quantized(model: Any) -> None:
    """Lets `save_pretrained`, Trainer and PEFT know what the model is."""
    from hqqlora.transformers.mark_quantized import mark_quantized

    mark_quantized(model)


# ---- which tensor goes where -------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A parameter of the model and the tensor for it."""

    parameter: str
    tensor: FileTensor
    reorder: RowOrder | None
    linear: bool
    """Whether it is the weight of a linear layer."""


def _match(model: Any, file: GGUFFile, architecture: Architecture) -> list[_Place]:
    translate = tensor_names(architecture, model.config.num_hidden_layers)
    rest = set(file.tensors) - {FREQUENCY_FACTORS}
    places = []
    for parameter, meta in model.named_parameters():
        name = translate(parameter)
        if name is None:
            raise ValueError(f"{file.path}: GGUF has no name for the parameter {parameter}")
        tensor = file.tensors.get(name)
        if tensor is None:
            raise ValueError(f"{file.path} lacks the tensor {name!r} for {parameter}")
        if tensor.shape != tuple(meta.shape):
            raise ValueError(
                f"{file.path}: tensor {name!r} is {list(tensor.shape)}, but {parameter} needs "
                f"{list(meta.shape)}"
            )
        rest.discard(name)
        module, _, kind = parameter.rpartition(".")
        linear = kind == "weight" and type(model.get_submodule(module)) is nn.Linear
        reorder = row_order(architecture, name, model.config)
        places.append(_Place(parameter, tensor, reorder, linear))
    if rest:
        raise ValueError(
            f"{file.path} holds {len(rest)} tensors that {type(model).__name__} has no place "
            f"for, such as {min(rest)!r}"
        )
    return places


def _warn_of_other_types(places: list[_Place], settings: QuantSettings | None) -> None:
    types = Counter(
        place.tensor.type
        for place in places
        if place.linear and place.tensor.type not in FORMATS and place.tensor.type not in _DENSE
    )
    if types:
        counts = ", ".join(f"{count} of type {kind}" for kind, count in types.most_common())
        become = "become dense" if settings is None else "are dequantized and quantized anew"
        warnings.warn(
            f"linear layers that HQQ cannot hold as they are {become}: {counts}", stacklevel=3
        )


# ---- filling in --------------------------------------------------------------------------


def _fill(
    model: Any,
    place: _Place,
    settings: QuantSettings | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    module, _, kind = place.parameter.rpartition(".")
    tensor = place.tensor
    format_ = FORMATS.get(tensor.type) if place.linear else None
    if format_ is not None:
        layer = model.get_submodule(module)
        quantized = _quantized(layer, place, format_, dtype, device)
        model.set_submodule(module, quantized)
        return
    dense = dequantize(tensor, dtype, place.reorder).to(device)
    layer = model.get_submodule(module)
    if place.linear and settings is not None and tensor.type not in _DENSE:
        model.set_submodule(module, _requantized(layer, dense, settings, module))
    else:
        setattr(layer, kind, nn.Parameter(dense))


def _quantized(
    layer: nn.Linear,
    place: _Place,
    format_: BlockFormat,
    dtype: torch.dtype,
    device: torch.device,
) -> HQQLinear:
    """The layer with the tensor's own codes."""
    config = BaseQuantizeConfig(format_.nbits, format_.group_size)
    quantized = HQQLinear(
        layer,
        config,
        compute_dtype=dtype,
        device="meta",
        initialize=False,
        meta_dtype=torch.float32,
    )
    groups = format_.decode(place.tensor.rows(0, place.tensor.row_count))
    if not groups.scale.isfinite().all() or not groups.zero.isfinite().all():
        row = int((~(groups.scale.isfinite() & groups.zero.isfinite())).any(dim=1).nonzero()[0])
        raise ValueError(
            f"tensor {place.tensor.name!r} has a scale or an offset in row {row} that is not "
            f"finite: the file is damaged"
        )
    codes, scale, zero = groups.codes, groups.scale, groups.zero
    if place.reorder is not None:
        codes, scale, zero = (place.reorder(part) for part in (codes, scale, zero))
    W_q = pack_codes(codes, format_.nbits, format_.group_size)
    quantized.W_q = _frozen(W_q, device)
    quantized.repack(planes_serve(quantized.device))
    quantized.scale = _frozen(scale.reshape(-1, 1), device)
    quantized.zero = _frozen(zero.reshape(-1, 1), device)
    if layer.bias is not None:
        quantized.bias = _frozen(layer.bias.detach(), device)
    return quantized


def _requantized(
    layer: nn.Linear, weight: Tensor, settings: QuantSettings, name: str
) -> HQQLinear:
    layer.weight = nn.Parameter(weight, requires_grad=False)
    try:
        return HQQLinear(layer, settings.to_config(), compute_dtype=weight.dtype)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _frozen(tensor: Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(tensor.to(device), requires_grad=False)


def dequantize(
    tensor: FileTensor, dtype: torch.dtype, reorder: RowOrder | None = None
) -> Tensor:
    """The tensor in `dtype`, some rows at a time, so that no float32 copy of all is made.

    Raises:
        ValueError: gguf cannot dequantize its type.
    """
    dense = torch.empty(tensor.shape, dtype=dtype, device="cpu")
    rows = dense.reshape(tensor.row_count, -1)
    for start, stop in _spans(tensor):
        rows[start:stop] = _dequantize_rows(tensor, start, stop)
    return dense if reorder is None else reorder(dense)


def _spans(tensor: FileTensor) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK // tensor.shape[-1])
    for start in range(0, tensor.row_count, step):
        yield start, min(start + step, tensor.row_count)


def _dequantize_rows(tensor: FileTensor, start: int, stop: int) -> Tensor:
    gguf = import_gguf()
    rows = tensor.rows(start, stop)
    if tensor.type == "F64":
        return rows.view(torch.float64)
    try:
        dense = gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[tensor.type])
    except NotImplementedError as error:
        raise ValueError(f"tensor {tensor.name!r}: {error}") from error
    return torch.from_numpy(dense)
