"""What a quantized weight says of its format, be it of one layer or of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hqqlora.state_encoding import LayerMetadata, check_dtype


class WeightFormat:
    """Properties of a module that has a `W_q` and, as `metadata`, its description."""

    W_q: Any
    scale: Any
    metadata: Any  # a LayerMetadata: attribute or property

    @property
    def nbits(self) -> int:
        """Bits of a code: 8, 4, 3, 2 or 1."""
        return self._description.settings.nbits

    @property
    def group_size(self) -> int:
        """Weights that share a scale and a zero."""
        return self._description.group_size

    @property
    def axis(self) -> int:
        """1: a group runs along a row; 0: down a column."""
        return self._description.settings.axis

    @property
    def compute_dtype(self) -> torch.dtype:
        """What `dequantize` gives; follows ``.to(dtype)``."""
        return self._description.compute_dtype

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        W_q: Tensor = self.W_q
        return W_q.device

    @property
    def quant_config(self) -> dict[str, Any]:
        """The configuration as hqq's dict, with the group size resolved."""
        config = self._description.settings.to_config()
        config["weight_quant_params"]["group_size"] = self.group_size
        return config

    def _metadata_after(self, fn: Callable[[Tensor], Tensor]) -> LayerMetadata:
        """The description when `fn` has been applied to all tensors. What it does to a dtype is
        seen on an empty tensor, before anything is changed.

        Raises:
            TypeError: they would no longer be float32, float16 or bfloat16.
        """
        dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.scale.device)).dtype
        check_dtype(f"the numbers of an {type(self).__name__}", dtype)
        return replace(self._description, compute_dtype=dtype)

    @property
    def _description(self) -> LayerMetadata:
        described: LayerMetadata = self.metadata
        return described
