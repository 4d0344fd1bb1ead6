"""The state_dict of a tensor-parallel model as that of the model on one rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hqqlora.distributed.tensor_parallel import ROWS, WeightPart, broadcast, put_weight
from hqqlora.linear import HQQLinear
from hqqlora.ops import PackedWeight, meta_shape, packed_shape
from hqqlora.planes import repacked
from hqqlora.repacking import join_columns, join_rows, part_group_size


def full_state_dict(model: nn.Module, *, cpu_offload: bool = False) -> dict[str, Any]:
    """What `model.state_dict()` was, or would be, without tensor parallelism: packed weights
    bit for bit, every DTensor (FSDP2's too) whole.

    Called on all ranks together. One layer is put together at a time.

    Args:
        model: whatever of it is parallel.
        cpu_offload: on the CPU, and on the first rank alone: {} on the others. As in torch's
            `StateDictOptions(full_state_dict=True, cpu_offload=True)`.

    Raises:
        ValueError: the parts of a weight are no whole: they have been changed one by one.
    """
    keep = not cpu_offload or torch.distributed.get_rank() == 0
    state: dict[str, Any] = model.state_dict()
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, HQQLinear) and layer.weight_part is not None:
            whole = gathered(layer).state_dict(prefix=f"{name}." if name else "")
            if keep:
                state.update({key: _kept(value, cpu_offload) for key, value in whole.items()})
    for key, value in state.items():
        whole_value = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            state[key] = _kept(whole_value, cpu_offload)
    return state if keep else {}


def _kept(value: Any, cpu_offload: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().cpu() if cpu_offload else value.detach()


def gathered(layer: HQQLinear) -> HQQLinear:
    """The layer of which `layer` is this rank's part. Called on all ranks together."""
    part = layer.weight_part
    assert part is not None
    join = join_rows if part.dim == ROWS else join_columns
    weight = join(_parts_of_all_ranks(layer, part), part.whole.group_size)
    whole = HQQLinear(None, None)
    whole._metadata = replace(part.whole, compute_dtype=layer.compute_dtype)
    put_weight(whole, weight, part.whole.settings)
    whole.state_dict_metadata = layer.state_dict_metadata
    whole.encoded_state_dict = layer.encoded_state_dict
    if layer.bias is not None:
        bias = whole_tensor(layer.bias)
        if part.dim == ROWS:
            pieces = []
            for rank in range(part.mesh.size()):
                mine = bias if rank == part.mesh.get_local_rank() else None
                shape = (len(part.range_of(rank)),)
                pieces.append(_from_rank(rank, mine, shape, bias, part))
            bias = torch.cat(pieces)
        whole.bias = nn.Parameter(bias, requires_grad=False)
    return whole


def _parts_of_all_ranks(layer: HQQLinear, part: WeightPart) -> list[PackedWeight]:
    mine = [whole_tensor(tensor) for tensor in (layer.W_q, layer.scale, layer.zero)]
    # Planes may fit the parts of some ranks alone.
    mine[0] = repacked(mine[0], layer.metadata.format, planes=False)
    N, K, nbits, axis = (
        part.whole.out_features,
        part.whole.in_features,
        layer.nbits,
        layer.axis,
    )
    like = PackedWeight(mine[0], mine[1], mine[2], N, K, nbits, part.whole.group_size, axis)
    parts = []
    for rank in range(part.mesh.size()):
        piece = part.range_of(rank)
        rows, columns = (piece, range(K)) if part.dim == ROWS else (range(N), piece)
        n, k, G = len(rows), len(columns), part_group_size(like, rows, columns)
        shapes = (packed_shape(n, k, nbits, G, axis), *[meta_shape(n, k, G, axis)] * 2)
        here = rank == part.mesh.get_local_rank()
        tensors = [
            _from_rank(rank, tensor if here else None, shape, tensor, part)
            for tensor, shape in zip(mine, shapes, strict=True)
        ]
        parts.append(PackedWeight(tensors[0], tensors[1], tensors[2], n, k, nbits, G, axis))
    return parts


def _from_rank(
    rank: int, mine: Tensor | None, shape: tuple[int, ...], like: Tensor, part: WeightPart
) -> Tensor:
    """A tensor of a rank, on all of them: on that rank itself `mine`."""
    tensor = like.new_empty(shape) if mine is None else mine
    broadcast(tensor, part.mesh, rank)
    return tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 may have cut."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
