"""A quantized model without data, to be sharded and then filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hqqlora.layers_to_quantize import layers_to_quantize
from hqqlora.linear import HQQLinear


def quantized_skeleton(
    model: nn.Module,
    config: Mapping[str, Any],
    skip_modules: Sequence[str] = ("lm_head",),
    compute_dtype: torch.dtype | None = None,
    meta_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Replaces every nn.Linear of `model`, whose parameters are on the meta device, by an
    `HQQLinear` there, in place: what `quantize_model` will have made of it, without data.

    Args:
        model: with its parameters on the meta device, as `accelerate.init_empty_weights`
            leaves them. (Buffers may have data, and need to if no checkpoint has them.)
        config, skip_modules, compute_dtype, meta_dtype: as in `quantize_model`.

    Returns:
        model, to be given adapters, sharded (`shard_model`) and filled (`load_sharded`).

    Raises:
        ValueError: a layer to quantize has data already; or as in `quantize_model`.
    """
    plan = layers_to_quantize(model, config, tuple(skip_modules))
    for name in plan:
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        if not dense.weight.is_meta:
            raise ValueError(
                f"{name} has data, on {dense.weight.device}: quantize_model quantizes that"
            )
    for name, (places, settings) in plan.items():
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        layer = HQQLinear(
            dense,
            settings.to_config(),
            compute_dtype=compute_dtype or dense.weight.dtype,
            meta_dtype=meta_dtype,
            initialize=False,
        )
        for place in places:
            model.set_submodule(place, layer)
    return model
