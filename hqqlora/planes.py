"""3 bits in memory: in planes, exactly 3 bits a weight. Files, and hqq, have words of 3.2.

A layer is made in planes where they fit (`planes_fit`) and serve; it keeps the packing that it
has, but for a way to a GPU or from one, and its `repack` changes it. What leaves a layer (a
state_dict, a file, hqq's layer) is in hqq's words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hqqlora.ops import PackedWeight, packed_shape, planes_fit, planes_shape
from hqqlora.ops.weight import is_planes, word_dtype
from hqqlora.shared_parameters import is_dtensor

# What a `PackedWeight` ends with: out_features, in_features, nbits, group_size, axis.
Format = tuple[int, int, int, int, int]


def planes_serve(device: torch.device) -> bool:
    """Whether planes are the faster packing: the kernels of GPUs read hqq's words many codes at
    a time, planes one by one; those of CPUs the other way round."""
    return device.type != "cuda"


def codes_layout(format_: Format, planes: bool) -> tuple[tuple[int, int], torch.dtype]:
    """Shape and dtype of `W_q`: in planes, where they fit, or in hqq's words."""
    if planes and planes_fit(*format_):
        return planes_shape(*format_), torch.uint8
    return packed_shape(*format_), word_dtype(format_[2])


def repacked(W_q: Tensor, format_: Format, planes: bool) -> Tensor:
    """`W_q` in planes, where they fit, or in hqq's words: the same tensor if it is so already,
    as is everything of other bits. With a first dimension E, of E experts. Of a DTensor this
    is for all ranks together."""
    nbits = format_[2]
    planes = planes and planes_fit(*format_)
    # (ZeRO-3 leaves a tensor without elements for what it has partitioned.)
    if nbits != 3 or is_planes(W_q, nbits) == planes or W_q.numel() == 0:
        return W_q
    if is_dtensor(W_q):
        return _shared_out(W_q, format_, planes)
    if W_q.dim() == 3:
        return _of_experts(W_q, format_, planes)
    packed: Tensor = torch.ops.hqqlora.repack(W_q.detach().contiguous(), *format_, planes)
    return packed


def packed_like(held: Tensor, W_q: Tensor, format_: Format) -> Tensor:
    """`W_q` as `held`, of the same format, is packed."""
    return repacked(W_q, format_, is_planes(held, format_[2]))


def in_words(weight: PackedWeight) -> PackedWeight:
    """The weight as hqq packs it."""
    return weight._replace(W_q=repacked(weight.W_q, weight[3:], planes=False))


def _of_experts(W_q: Tensor, format_: Format, planes: bool) -> Tensor:
    first = repacked(W_q[0], format_, planes)
    packed = first.new_empty((len(W_q), *first.shape))
    for expert, codes in enumerate(W_q):
        packed[expert] = repacked(codes, format_, planes)
    return packed


def _shared_out(W_q: Tensor, format_: Format, planes: bool) -> Tensor:
    """A row in one packing is not a row in the other: put together, and shared out again."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    shared: Any = W_q.detach()
    mesh, placements, local = shared.device_mesh, shared.placements, shared.to_local()
    if local.is_meta:
        whole = torch.empty(shared.shape, dtype=shared.dtype, device="meta")
    else:
        whole = shared.to(mesh.device_type).full_tensor()  # from where CPU offload keeps it
    parts: Any = distribute_tensor(
        repacked(whole, format_, planes), mesh, placements, src_data_rank=None
    )
    mine = parts.to_local().to(local.device, copy=True)  # rather than a view of the whole
    return DTensor.from_local(
        mine, mesh, placements, run_check=False, shape=parts.shape, stride=parts.stride()
    )
