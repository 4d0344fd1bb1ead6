"""hqq's own HQQLinear: read in place, and converted both ways without quantizing again.

hqq is optional: it is imported only where one of its layers is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hqqlora.ops import PackedWeight, meta_shape, packed_shape
from hqqlora.ops.weight import word_dtype
from hqqlora.optional_packages import needing
from hqqlora.state_encoding import PACKING, scale_and_zero
from hqqlora.state_values import META_DTYPES

if TYPE_CHECKING:
    from hqqlora.linear import HQQLinear

_BITS_OF_PACKING = {packing: nbits for nbits, packing in PACKING.items()}
# What hqq keeps in `quant_config` and not in `meta`.
_CONFIG_KEYS = ("channel_wise", "optimize", "round_zero")


def packed_weight(layer: nn.Module) -> PackedWeight | None:
    """The weight of hqq's `layer` as the operators take it. `W_q` is hqq's own tensor, viewed
    as whole numbers if it was `view_as_float`; scale and zero are those in `meta`, too, unless
    hqq has them quantized, stacked or elsewhere.

    Returns None where the layer holds something that the operators do not take: no weight yet,
    unpacked codes, one scale for a whole matrix, a zero that is being trained.
    """
    meta: dict[str, Any] | None = layer.meta  # type: ignore[assignment]
    W_q = layer.W_q
    if not layer.ready or not isinstance(W_q, torch.Tensor) or meta is None:
        return None
    # hqq stores 5 and 6 bits as 8, and 1.58 as 2: the packing tells, not "nbits".
    nbits = _BITS_OF_PACKING.get(meta["packing"])
    if nbits is None:
        return None
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _make_saveable(meta)
    try:
        scale, zero = scale_and_zero(meta, "layer")
    except ValueError:
        return None
    if scale is None or zero is None or scale.requires_grad or zero.requires_grad:
        return None
    dtype = torch.promote_types(scale.dtype, zero.dtype)
    N, K = meta["shape"]
    axis = meta["axis"]
    group_size = meta["group_size"] or (K if axis == 1 else N)
    if dtype not in META_DTYPES or (N * K) % group_size or not W_q.is_contiguous():
        return None
    words = word_dtype(nbits)
    if W_q.dtype != words:
        W_q = W_q.view(words)
    groups = meta_shape(N, K, group_size, axis)
    fits = tuple(W_q.shape) == packed_shape(N, K, nbits, group_size, axis)
    if not fits or not scale.numel() == zero.numel() == groups[0] * groups[1]:
        return None
    scale = scale.to(W_q.device, dtype).reshape(groups)
    zero = zero.to(W_q.device, dtype).reshape(groups)
    if compiling and dtype == torch.float32:  # the compiler cannot tell which can be saved
        scale, zero = scale.clone(), zero.clone()
    return PackedWeight(
        W_q,
        scale,
        zero,
        N,
        K,
        nbits,
        group_size,
        axis,
    )


def _make_saveable(meta: dict[str, Any]) -> None:
    """hqq optimizes in inference mode, and a float32 layer keeps the scale and zero from there,
    which autograd cannot save: puts ordinary tensors with the same numbers in their place."""
    if torch.is_inference_mode_enabled():
        return
    for name in ("scale", "zero"):
        tensor = meta.get(name)
        if isinstance(tensor, torch.Tensor) and tensor.is_inference():
            meta[name] = tensor.clone()


def from_hqq(layer: nn.Module) -> HQQLinear:
    """This library's layer with the weight of hqq's `layer`; see `HQQLinear.from_hqq`."""
    from hqqlora.linear import HQQLinear

    meta = getattr(layer, "meta", None)
    if isinstance(layer, HQQLinear) or not (hasattr(layer, "W_q") and hasattr(layer, "ready")):
        raise TypeError(f"layer must be hqq's HQQLinear, not {type(layer).__name__}")
    if not layer.ready or meta is None:
        raise ValueError("this HQQLinear of hqq's has no weight yet")
    _make_saveable(meta)
    state: dict[str, Any] = {"compute_dtype": layer.compute_dtype, **meta}
    quant_config: Any = layer.quant_config or {}
    weight_config = quant_config.get("weight_quant_params", {})
    state.update({key: weight_config[key] for key in _CONFIG_KEYS if key in weight_config})
    state.update(W_q=layer.W_q, bias=layer.bias)
    # Without a device of its own the layer takes the tensors as they are.
    ours = HQQLinear(None, None, device="meta")
    ours.load_state_dict(state, assign=True)
    return ours.train(layer.training)


def raw_state(layer: HQQLinear) -> dict[str, Any]:
    """The state of `layer` as hqq has it without encoding: tensors, which are the layer's own
    (but for codes of 3 bits in planes), and plain Python values."""
    state = layer.metadata.values()
    del state["encoded_state_dict"]  # its absence says that the values are plain
    state.update(
        W_q=layer.stored("W_q", layer.W_q.detach()),
        scale=layer.scale.detach(),
        zero=layer.zero.detach(),
    )
    if layer.bias is not None:
        state["bias"] = layer.bias.detach()
    return state


def to_hqq(layer: HQQLinear) -> nn.Module:
    """hqq's layer with the weight of `layer`; see `HQQLinear.to_hqq`."""
    state = raw_state(layer)
    with needing("to_hqq"):
        from hqq.core.quantize import HQQLinear as HqqPackageLinear
    theirs: nn.Module = HqqPackageLinear(
        None,
        None,
        compute_dtype=layer.compute_dtype,
        device=str(layer.device),
        initialize=False,
    )
    theirs.load_state_dict(state)
    return theirs.train(layer.training)
