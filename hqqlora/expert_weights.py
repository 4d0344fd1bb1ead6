"""HQQExpertWeights: the frozen weights of all experts of a mixture, in 8 to 1 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hqqlora.autograd import grouped_linear
from hqqlora.config import QuantSettings
from hqqlora.ops import PackedWeight
from hqqlora.planes import packed_like, planes_serve, repacked
from hqqlora.quantizing import quantize_weight
from hqqlora.state_encoding import (
    METADATA_KEYS,
    LayerMetadata,
    check_dtype,
    decode_layer,
)
from hqqlora.weight_format import WeightFormat
from hqqlora.zero_partitions import check_replaceable

KEYS = ("W_q", "scale", "zero")


class HQQExpertWeights(WeightFormat, nn.Module):
    """E matrices [out_features, in_features], each packed in hqq's format, stacked.

    `W_q`, `scale` and `zero` are frozen parameters with a first dimension E; ``W_q[e]``,
    ``scale[e]`` and ``zero[e]`` are what an `HQQLinear` of expert e alone would have (3 bits in
    planes). Its state_dict has hqq's keys and words; `shape` there is that of one matrix.
    """

    W_q: nn.Parameter
    scale: nn.Parameter
    zero: nn.Parameter
    metadata: LayerMetadata
    _format: tuple[int, int, int, int, int]

    def __init__(
        self,
        num_experts: int,
        metadata: LayerMetadata,
        meta_dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        """Makes tensors of the right shapes; see `from_weights`.

        Args:
            num_experts: E.
            metadata: of each matrix.
            meta_dtype: of scale and zero. None: metadata's compute_dtype.
            device: where to live.
        """
        super().__init__()
        self.state_dict_metadata = True
        self._allocate(num_experts, metadata, meta_dtype or metadata.compute_dtype, device)

    @classmethod
    def from_weights(
        cls,
        weight: Tensor,
        quant_config: Mapping[str, Any],
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        *,
        meta_dtype: torch.dtype | None = None,
    ) -> HQQExpertWeights:
        """Quantizes `weight` [E, out_features, in_features], one expert after another.

        Args:
            weight: float32, bfloat16 or float16.
            quant_config: as ``BaseQuantizeConfig`` gives it.
            compute_dtype: what `dequantize` gives. None: weight's dtype.
            device: where to quantize and live. None: weight's device.
            meta_dtype: of scale and zero. None: compute_dtype.

        Raises:
            ValueError: another number of dimensions, no expert, the group size does not fit, or
                an element is not finite; names it.
        """
        settings = QuantSettings.parse(quant_config)
        if weight.dim() != 3 or weight.size(0) == 0:
            raise ValueError(
                f"weight must be [experts, out_features, in_features]: {list(weight.shape)}"
            )
        dtype = compute_dtype or weight.dtype
        for name, of in (("compute_dtype", dtype), ("meta_dtype", meta_dtype or dtype)):
            check_dtype(name, of)
        metadata = LayerMetadata(settings, weight.size(1), weight.size(2), dtype)
        settings.group_size_for(weight.size(1), weight.size(2))
        made = cls(weight.size(0), metadata, meta_dtype, device or weight.device)
        made.requantize(weight)
        return made

    # ---- what it is -----------------------------------------------------------------

    @property
    def num_experts(self) -> int:
        """E."""
        return self.W_q.size(0)

    @property
    def out_features(self) -> int:
        """N."""
        return self.metadata.out_features

    @property
    def in_features(self) -> int:
        """K."""
        return self.metadata.in_features

    @property
    def packed(self) -> PackedWeight:
        """The stacked weights, as the grouped operators take them."""
        return PackedWeight(self.W_q, self.scale, self.zero, *self._format)

    def expert(self, index: int) -> PackedWeight:
        """The weight of expert `index`, as the operators of one layer take it; a view."""
        return PackedWeight(self.W_q[index], self.scale[index], self.zero[index], *self._format)

    @property
    def weight(self) -> Tensor:
        """A placeholder [E, out_features, in_features] of NaN that takes no memory, for code
        that reads a parameter's shape, dtype or device."""
        shape = (self.num_experts, self.out_features, self.in_features)
        nan = torch.full((), float("nan"), dtype=self.compute_dtype, device=self.device)
        return nan.expand(shape)

    def extra_repr(self) -> str:
        """What `print(module)` says."""
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, nbits={self.nbits}, "
            f"group_size={self.group_size}, axis={self.axis}, "
            f"compute_dtype={self.compute_dtype}"
        )

    # ---- what it does ---------------------------------------------------------------

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """y [M, out_features] for rows x [M, in_features] sorted by expert, of which expert e
        has offsets[e] to offsets[e + 1] - 1; offsets: int64 [E + 1] on the CPU."""
        return grouped_linear(x, self.packed, offsets)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weights [E, out_features, in_features], computed in float32 and rounded
        once to `dtype` (None: compute_dtype)."""
        dtype = dtype or self.compute_dtype
        dense = torch.empty(self.weight.shape, dtype=dtype, device=self.device)
        for index in range(self.num_experts):
            dense[index] = torch.ops.hqqlora.dequantize(*self.expert(index), dtype)
        return dense

    @torch.no_grad()
    def requantize(self, weight: Tensor) -> None:
        """Replaces the weights by `weight` [E, out_features, in_features], quantized with this
        module's configuration.

        Raises:
            ValueError: another shape, or an element is not finite (names expert, row and
                column); nothing is changed.
        """
        if weight.shape != self.weight.shape:
            raise ValueError(f"weight {list(weight.shape)} is not {list(self.weight.shape)}")
        new = [torch.empty_like(parameter) for parameter in (self.W_q, self.scale, self.zero)]
        for index in range(self.num_experts):
            dense = weight[index].to(self.device)
            try:
                W_q, *meta = quantize_weight(dense, self.metadata.settings, self.scale.dtype)
            except (TypeError, ValueError) as error:
                raise type(error)(f"expert {index}: {error}") from error
            parts = [packed_like(self.W_q, W_q, self._format), *meta]
            for tensor, part in zip(new, parts, strict=True):
                tensor[index] = part
        self.W_q.data, self.scale.data, self.zero.data = new

    # ---- moving and converting ------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HQQExpertWeights:
        converted, before = self._metadata_after(fn), self.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.metadata = converted
        self._repack_after_move(before)
        return self

    # ---- checkpoints ----------------------------------------------------------------

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = prefix + "W_q"
        destination[key] = repacked(destination[key], self._format, planes=False)
        if self.state_dict_metadata:
            encoded = self.metadata.encoded()
            destination.update((prefix + key, value) for key, value in encoded.items())

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key.removeprefix(prefix): key for key in state_dict if key.startswith(prefix)}
        stored = {key: state_dict[name] for key, name in own.items() if key in METADATA_KEYS}
        if stored and all(key in own for key in KEYS):
            layer = prefix.rstrip(".") or "experts"
            tensors = {key: state_dict[prefix + key] for key in KEYS}
            found = decode_layer(
                {**stored, **tensors}, layer, self.metadata.settings.solver
            ).metadata
            assert found is not None
            held = self.metadata
            if (found.out_features, found.in_features) != (held.out_features, held.in_features):
                error_msgs.append(
                    f"size mismatch for {layer}: the checkpoint's weights are "
                    f"[{found.out_features}, {found.in_features}], this module's "
                    f"[{held.out_features}, {held.in_features}]"
                )
                return
            # The checkpoint decides on bits, group size and axis.
            found = replace(found, compute_dtype=held.compute_dtype)
            if found.settings != held.settings:
                self._allocate(self.num_experts, found, self.scale.dtype, self.device)
        rest = {k: v for k, v in state_dict.items() if k.removeprefix(prefix) not in stored}
        words = rest.get(prefix + "W_q")
        expected, dtype = self.metadata.held(planes=False)
        if isinstance(words, Tensor) and (words.shape[1:], words.dtype) == (expected, dtype):
            rest[prefix + "W_q"] = packed_like(self.W_q, words, self._format)
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _allocate(
        self,
        num_experts: int,
        metadata: LayerMetadata,
        meta_dtype: torch.dtype,
        device: torch.device | str | int | None,
    ) -> None:
        if metadata.settings.view_as_float:
            raise ValueError("view_as_float is not for the weights of experts: leave it off")
        place = torch.get_default_device() if device is None else torch.device(device)
        for name, shape, dtype in (
            ("W_q", *metadata.held(planes_serve(place))),
            ("scale", metadata.meta_shape, meta_dtype),
            ("zero", metadata.meta_shape, meta_dtype),
        ):
            check_replaceable(self._parameters.get(name), name, dtype, shape)
            tensor = torch.empty((num_experts, *shape), dtype=dtype, device=device)
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        self.metadata = metadata
        self._format = metadata.format
