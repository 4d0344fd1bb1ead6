"""How PEFT's tuners other than LoRA (VeRA, OFT, MiSS, ...) read and write the weight of a
quantized layer. For PEFT from 0.20 on."""

from __future__ import annotations

from typing import Any

from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from hqqlora.linear import HQQLinear
from hqqlora.peft.merging import requantize


class HQQBackend(QuantizationBackend):  # type: ignore[misc]
    """The weight of one tuner layer's `HQQLinear`, dequantized and quantized again; or of the
    nn.Linear that `merge_and_unload` puts in its place."""

    supports_merge = True
    backend_name = "hqqlora"
    layer_type = "linear"

    def __init__(self) -> None:
        """Has nothing to go back to yet."""
        self._unmerged: tuple[Tensor, Tensor, Tensor] | None = None

    def get_base_weight(self, base_layer: HQQLinear | nn.Linear) -> Tensor:
        """The dense weight [out_features, in_features]."""
        if isinstance(base_layer, HQQLinear):
            return base_layer.dequantize()
        return base_layer.weight.data

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Called by the tuner to merge, before it notes the adapter as merged, and to unmerge,
        after it has struck it out: without any merged, the codes from before come back, bit for
        bit, instead of what `weight_data` would be rounded to."""
        base: HQQLinear | nn.Linear = peft_layer.get_base_layer()
        weight_data = weight_data.detach()
        if not isinstance(base, HQQLinear):
            base.weight.data = weight_data
        elif self._unmerged is None:
            unmerged = (base.W_q.data, base.scale.data, base.zero.data)
            peft_layer.requantization_error = requantize(base, weight_data.float())
            self._unmerged = unmerged
        elif peft_layer.merged_adapters:
            peft_layer.requantization_error = requantize(base, weight_data.float())
        else:
            W_q, scale, zero = self._unmerged
            base.W_q.data = W_q.to(base.W_q.device)
            base.scale.data, base.zero.data = scale.to(base.scale), zero.to(base.zero)
            self._unmerged = peft_layer.requantization_error = None


def backend_for(base: nn.Module) -> HQQBackend | None:
    """A backend for an `HQQLinear`; None for other layers."""
    return HQQBackend() if isinstance(base, HQQLinear) else None
