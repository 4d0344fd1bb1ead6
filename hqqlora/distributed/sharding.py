"""fully_shard over a model with quantized layers: block by block, then what is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from hqqlora.linear import HQQLinear


def shard_model(
    model: nn.Module,
    blocks: Sequence[nn.Module] | None = None,
    *,
    mesh: DeviceMesh | None = None,
    reshard_after_forward: bool | int | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
) -> nn.Module:
    """Applies `torch.distributed.fsdp.fully_shard` (FSDP2) to each block of `model`, then to
    `model` itself, in place. Frozen `W_q`, scale and zero are shared out like everything else.

    It differs from calling fully_shard oneself, which works too, in two respects:

    - `mp_policy.param_dtype` is not applied to quantized layers and their adapters. fully_shard
      leaves the integers of `W_q` alone, but would round scales and zeros to `param_dtype`, and
      with them every weight. Such layers form a group of their own in each block, with a
      second all-gather; where scales have that dtype already there is none.
    - Parameters with fewer rows than there are ranks (scales and zeros with axis=0 have one)
      are divided along their columns, if those divide evenly. fully_shard would give them to
      the first ranks whole, and pad the others to the same size.

    Args:
        model: with its parameters on the CPU, on the mesh's device, or on the meta device (see
            `load_sharded`).
        blocks: what is gathered and freed as one; None: the elements of every nn.ModuleList
            that is not inside another, which are a transformer's layers.
        mesh, reshard_after_forward, mp_policy, offload_policy: as in fully_shard.

    Returns:
        model, of a class that is also an FSDPModule.

    Raises:
        ValueError: blocks is None and there is no nn.ModuleList.
    """
    policy = mp_policy or MixedPrecisionPolicy()
    if mesh is None:
        device = torch.accelerator.current_accelerator()
        kind = "cpu" if device is None else device.type
        mesh = init_device_mesh(kind, (dist.get_world_size(),))
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": reshard_after_forward,
        "offload_policy": offload_policy or OffloadPolicy(),
        "shard_placement_fn": _placement(mesh.size(mesh.ndim - 1)),
    }
    # Scales are not cast, so neither is x for their layers: the block's own inputs have been.
    uncast = replace(policy, param_dtype=None, output_dtype=None, cast_forward_inputs=False)
    for part in [*(blocks if blocks is not None else transformer_blocks(model)), model]:
        layers = list(_layers_to_keep(part, policy.param_dtype))
        if layers and part not in layers:
            fully_shard(layers, mp_policy=uncast, **options)
        fully_shard(part, mp_policy=uncast if part in layers else policy, **options)
    return model


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The elements of every nn.ModuleList that is not inside another.

    Raises:
        ValueError: there is no nn.ModuleList.
    """
    if isinstance(model, nn.ModuleList):
        return list(model)
    blocks: list[nn.Module] = []
    stack = list(model.children())[::-1]
    while stack:
        module = stack.pop()
        if isinstance(module, nn.ModuleList):
            blocks.extend(module)
        else:
            stack.extend(list(module.children())[::-1])
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList: say what its blocks are"
        )
    return blocks


def _layers_to_keep(block: nn.Module, dtype: torch.dtype | None) -> Iterator[nn.Module]:
    """The quantized layers, each with its adapter around it if there is one, that are not
    sharded yet and whose scales have another dtype than `dtype`."""
    if dtype is None:
        return
    stack = [block]
    while stack:
        module = stack.pop()
        base = module if isinstance(module, HQQLinear) else getattr(module, "base_layer", None)
        if not isinstance(base, HQQLinear):
            stack.extend(list(module.children())[::-1])
        elif not _is_sharded(base) and base.scale.dtype != dtype:
            yield module


def _is_sharded(layer: HQQLinear) -> bool:
    return isinstance(layer.W_q, torch.distributed.tensor.DTensor)


def _placement(ranks: int) -> Any:
    """The argument `shard_placement_fn` of fully_shard: None means Shard(0)."""

    def place(parameter: nn.Parameter) -> Shard | None:
        few_rows = parameter.dim() > 1 and parameter.size(0) < ranks
        return Shard(1) if few_rows and parameter.size(1) % ranks == 0 else None

    return place
