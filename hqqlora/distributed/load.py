"""Filling a sharded model from a dense checkpoint: each layer is quantized by one rank."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hqqlora.distributed.adapter_values import new_adapters, same_random_numbers
from hqqlora.distributed.dense_checkpoint import DenseCheckpoint
from hqqlora.distributed.shares import Share, communication_device
from hqqlora.linear import HQQLinear
from hqqlora.module_names import unwrapped
from hqqlora.planes import packed_like
from hqqlora.quantizing import quantize_weight

QUANTIZED = ("W_q", "scale", "zero")


@dataclass(frozen=True)
class _Layer:
    """A quantized layer to fill, under its first name, and where its dense weight is."""

    name: str
    module: HQQLinear
    key: str


@torch.no_grad()
def load_sharded(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    init_lora_weights: bool | str = True,
) -> nn.Module:
    """Gives data to every parameter of `model` that is on the meta device, in place.

    No rank holds the dense model at any time. Quantized layers are dealt out to the ranks: one
    reads a layer's dense weight, quantizes it and sends each rank its part of `W_q`, scale and
    zero, so that a rank holds one dense weight at most, and each is read and quantized once.
    Of other tensors each rank reads its own part. With a replicated dimension in the mesh
    (HSDP) all this is done in each replica. The codes are those of one process.

    ::

        with accelerate.init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        quantized_skeleton(model, BaseQuantizeConfig(nbits=4, group_size=64))
        add_lora(model, r=16)
        shard_model(model, mesh=mesh)
        load_sharded(model, folder)

    Adapters without data (`LoRALinear` and PEFT's LoRA) are initialised: rank 0's random
    numbers count, and are those that `add_lora` would have drawn in one process.

    Args:
        model: sharded by `shard_model` or fully_shard; or not sharded at all, in one process.
        checkpoint: a folder of safetensors files with Hugging Face's names, dense.
        device: where parameters live; None: where the ranks communicate. With CPU offload:
            "cpu".
        init_lora_weights: of adapters: True, False or "gaussian", as in `LoRALinear`.

    Returns:
        model.

    Raises:
        FileNotFoundError: there is no checkpoint in the folder.
        ValueError: before anything is read: a parameter or buffer has neither data nor a tensor
            in the checkpoint, or one of another shape (names all of them); later, and on the
            rank concerned: a weight is not finite, naming layer and element.
    """
    source = DenseCheckpoint(checkpoint)
    layers, others, adapter_names = _plan(model, source)
    adapters = new_adapters(model, adapter_names)
    device = communication_device(model) if device is None else torch.device(device)
    _allocate(model, device)
    _quantize(model, layers, source)
    for name, key in others.items():
        share = Share.of(model.get_parameter(name), name)
        if share.shape:
            share.fill(source.part(key, share.dim, share.start, share.stop))
        else:
            share.fill(source.tensor(key))
    with same_random_numbers(model):
        for adapter in adapters:
            for name, value in adapter.values(init_lora_weights).items():
                share = Share.of(model.get_parameter(name), name)
                share.fill(value.narrow(share.dim, share.start, share.stop - share.start))
    return model


# ---- what is to be filled from where ------------------------------------------------------


def _plan(
    model: nn.Module, source: DenseCheckpoint
) -> tuple[list[_Layer], dict[str, str], list[str]]:
    """The quantized layers, the other parameters with the keys of their tensors, and the
    parameters of adapters."""
    layers: list[_Layer] = []
    others: dict[str, str] = {}
    adapters: list[str] = []
    problems: list[str] = []
    seen: set[int] = set()
    prefix = getattr(model, "base_model_prefix", "")
    for module_name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{attribute}" if module_name else attribute
            if not parameter.is_meta or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            quantized = isinstance(module, HQQLinear) and attribute in QUANTIZED
            wanted = f"{module_name}.weight" if quantized else name
            key = _key_of(wanted, source, prefix)
            if "lora_" in name:
                adapters.append(name)
            elif key is None:
                if not quantized or attribute == "W_q":
                    problems.append(f"{wanted} is not in {source.folder}")
            elif quantized:
                assert isinstance(module, HQQLinear)
                shape = (module.out_features, module.in_features)
                if attribute == "W_q":
                    layers.append(_Layer(module_name, module, key))
                    problems += _difference(key, source.shape(key), shape)
            else:
                others[name] = key
                problems += _difference(key, source.shape(key), tuple(parameter.shape))
    problems += [
        f"{name}, a buffer, has no data: build the model under accelerate.init_empty_weights()"
        for name, buffer in model.named_buffers()
        if buffer.is_meta
    ]
    if problems:
        raise ValueError("\n".join(problems))
    # Layers of one size together: ranks that quantize at once then take equally long.
    layers.sort(key=lambda layer: -layer.module.in_features * layer.module.out_features)
    return layers, others, adapters


def _difference(key: str, stored: Sequence[int], wanted: Sequence[int]) -> Iterator[str]:
    if tuple(stored) != tuple(wanted):
        yield f"{key} is {list(stored)} in the checkpoint, but {list(wanted)} in the model"


def _key_of(name: str, source: DenseCheckpoint, prefix: str) -> str | None:
    """The key of the parameter `name`, which may be inside wrappers and adapters."""
    key = unwrapped(name).removeprefix("base_model.model.").replace(".base_layer.", ".")
    for candidate in (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")):
        if candidate in source:
            return candidate
    return None


# ---- filling -------------------------------------------------------------------------------


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Memory for what is on the meta device. Parameters that were one object remain one."""
    first: dict[int, str] = {}
    again: list[tuple[str, str]] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            again.append((name, first[id(parameter)]))
        else:
            first[id(parameter)] = name
    apply: Any = model._apply
    apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    for name, original in again:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, model.get_parameter(original))


def _quantize(model: nn.Module, layers: Sequence[_Layer], source: DenseCheckpoint) -> None:
    """Rounds in which each rank quantizes a layer; then one after another hands out its own."""
    device = communication_device(model)
    for layer_group in _groups(layers):
        group = Share.of(layer_group[0].module.W_q, layer_group[0].name).group
        rank, ranks = (0, 1) if group is None else (dist.get_rank(group), group.size())
        for start in range(0, len(layer_group), ranks):
            turn = layer_group[start : start + ranks]
            mine, error = None, None
            if rank < len(turn):
                try:
                    mine = _quantized(turn[rank], source, device)
                except (OSError, RuntimeError, TypeError, ValueError) as met:
                    error = met
            _raise_together(error, group)
            for owner, layer in enumerate(turn):
                for i, attribute in enumerate(QUANTIZED):
                    share = Share.of(getattr(layer.module, attribute), layer.name)
                    whole = mine[i] if mine is not None and owner == rank else None
                    share.receive(whole, owner, device)


def _groups(layers: Iterable[_Layer]) -> Iterator[list[_Layer]]:
    """Layers by the group of ranks that shares them: all, but for unusual meshes."""
    by_group: dict[int, list[_Layer]] = {}
    for layer in layers:
        group = Share.of(layer.module.W_q, layer.name).group
        by_group.setdefault(id(group), []).append(layer)
    yield from by_group.values()


def _quantized(
    layer: _Layer, source: DenseCheckpoint, device: torch.device
) -> tuple[Tensor, ...]:
    module = layer.module
    try:
        W_q, scale, zero = quantize_weight(
            source.tensor(layer.key).to(device), module.metadata.settings, module.scale.dtype
        )
    except ValueError as error:
        raise ValueError(f"{layer.name}: {error}") from error
    return packed_like(module.W_q, W_q, module.metadata.format), scale, zero


def _raise_together(error: Exception | None, group: dist.ProcessGroup | None) -> None:
    """Raises on every rank what one has met: the others would wait for it for ever."""
    if group is None:
        if error is not None:
            raise error
        return
    errors: list[Exception | None] = [None] * group.size()
    dist.all_gather_object(errors, error, group=group)
    for met in errors:
        if met is not None:
            raise met
