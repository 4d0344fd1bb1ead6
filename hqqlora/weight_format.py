"""What a quantized weight says of its format, be it of one layer or of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hqqlora.planes import planes_serve, repacked
from hqqlora.shared_parameters import is_dtensor
from hqqlora.state_encoding import LayerMetadata, check_dtype
from hqqlora.zero_partitions import check_replaceable


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

    @torch.no_grad()
    def repack(self, planes: bool) -> None:
        """Holds 3-bit codes in planes (`W_q` uint8, exactly 3 bits a weight and faster, as they
        are from the beginning) or in hqq's words (int32, 3.2 bits or more). That is for code
        that reads `W_q` itself, or fills it from a file; products and the state_dict are the
        same. Other bits, and weights that planes do not fit (`hqqlora.ops.planes_fit`), have
        one packing alone: nothing is done.

        Raises:
            RuntimeError: the layer has no weight yet.
            ValueError: FSDP2 or ZeRO-3 has shared `W_q` out, and would not know of another.
        """
        metadata = self._description
        shape, dtype = metadata.held(planes)
        if self.W_q.dtype == dtype:
            return
        check_replaceable(self.W_q, "W_q", dtype, shape)
        if is_dtensor(self.W_q):
            raise ValueError("W_q is shared out among ranks: repack it before")
        self.W_q.data = repacked(self.W_q, metadata.format, planes)

    def _repack_after_move(self, before: torch.device) -> None:
        """In words on a GPU, and in planes when it comes back: see `planes_serve`. What is
        shared out among ranks, or without data, stays as it is."""
        after = self.device
        moved = planes_serve(before) != planes_serve(after) and after.type != "meta"
        if moved and self.W_q.numel() and not is_dtensor(self.W_q):
            self.repack(planes_serve(after))

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
