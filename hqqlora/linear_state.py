"""What an HQQLinear holds, written to a state_dict and read from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hqqlora.config import QuantSettings
from hqqlora.planes import packed_like, planes_serve, repacked
from hqqlora.state_encoding import (
    LAYER_KEYS,
    METADATA_KEYS,
    LayerMetadata,
    decode_layer,
    fit_tensors,
)
from hqqlora.weight_format import WeightFormat
from hqqlora.zero_partitions import (
    check_replaceable,
    full_for_partitioned,
    partitioned_of,
    stand_in,
    whole_shape,
)


class LinearState(WeightFormat, nn.Linear):
    """The part of `HQQLinear` that makes its parameters and keeps its description beside them.

    A checkpoint decides the format, so that loading may make parameters anew.
    """

    W_q: nn.Parameter
    scale: nn.Parameter
    zero: nn.Parameter
    state_dict_metadata: bool
    encoded_state_dict: bool
    _metadata: LayerMetadata | None
    # What `HQQLinear.packed` ends with: one attribute, as every forward reads it.
    _format: tuple[int, int, int, int, int] | None
    # The constructor's quant_config, compute_dtype, meta_dtype and device.
    _wanted: tuple[
        QuantSettings | None,
        torch.dtype | None,
        torch.dtype | None,
        torch.device | str | int | None,
    ]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        m = self._metadata
        if m is None:
            return
        words = repacked(destination[prefix + "W_q"], m.format, planes=False)
        destination[prefix + "W_q"] = words
        if not self.state_dict_metadata:
            return
        destination[prefix + "W_q"] = self.stored("W_q", words)
        values = m.encoded() if self.encoded_state_dict else m.values()
        if not self.encoded_state_dict:
            del values["encoded_state_dict"]
        destination.update((prefix + key, value) for key, value in values.items())

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor`, the parameter `name`, as a state_dict has it: `W_q` in hqq's words, as
        floats with view_as_float."""
        if name != "W_q":
            return tensor
        tensor = repacked(tensor, self.metadata.format, planes=False)
        if not self.metadata.settings.view_as_float:
            return tensor
        self.metadata.check_float_view()
        return tensor.detach().view(self.compute_dtype)

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
        own = {
            key: state_dict[prefix + key] for key in LAYER_KEYS if prefix + key in state_dict
        }
        rest = {
            key: value
            for key, value in state_dict.items()
            if not (key.startswith(prefix) and key[len(prefix) :] in LAYER_KEYS)
        }
        metadata = None
        if any(key in own for key in ("W_q", "scale", "zero", "zero_scale", "meta")):
            layer = prefix.rstrip(".") or "layer"
            partitioned = partitioned_of(self._parameters, own)
            if problem := full_for_partitioned(partitioned, own, layer):
                error_msgs.append(problem)
                return
            stand_ins = {name: stand_in(part) for name, part in partitioned.items()}
            tensors, metadata = self._decode({**own, **stand_ins}, layer)
            tensors.update({name: own[name] for name in partitioned})  # empty into empty
            assign = local_metadata.get("assign_to_params_buffers", False)
            if tensors["W_q"].is_meta and not assign and not self._takes_meta():
                raise ValueError(
                    f"{layer}: the checkpoint is on the meta device: it has no data"
                )
            if not self._adopt(metadata, tensors, layer, error_msgs):
                return
            tensors["W_q"] = packed_like(self.W_q, tensors["W_q"], metadata.format)
            rest.update((prefix + name, tensor) for name, tensor in tensors.items())
        elif self._metadata is None:
            missing_keys.append(prefix + "W_q")
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if metadata is not None and local_metadata.get("assign_to_params_buffers", False):
            self._metadata = metadata  # the parameters are the checkpoint's own now

    def _decode(
        self, own: dict[str, Any], layer: str
    ) -> tuple[dict[str, Tensor], LayerMetadata]:
        held, wanted = self._metadata, self._wanted[0]
        settings = held.settings if held is not None else wanted
        state = decode_layer(own, layer, settings.solver if settings else "default")
        metadata = state.metadata or held
        if metadata is None:
            raise ValueError(f"{layer}: neither the checkpoint nor the layer has metadata")
        return fit_tensors(state, metadata, layer), metadata

    def _takes_meta(self) -> bool:
        """Whether tensors without data can be copied into this layer."""
        if self._metadata is not None:
            return self.W_q.is_meta
        device = self._wanted[3]
        return device is None or torch.device(device).type == "meta"

    def _adopt(
        self,
        metadata: LayerMetadata,
        tensors: dict[str, Tensor],
        layer: str,
        error_msgs: list[str],
    ) -> bool:
        """Gives this layer the format of a checkpoint's; False, and a message, if the shape of
        the weight is another."""
        held = self._metadata
        N, K = metadata.out_features, metadata.in_features
        if held is None:
            _, compute_dtype, meta_dtype, device = self._wanted
            compute_dtype = compute_dtype or metadata.compute_dtype
            meta_dtype = meta_dtype or tensors["scale"].dtype
            place = tensors["W_q"].device if device is None else torch.device(device)
            bias = "bias" in tensors
        elif (held.out_features, held.in_features) == (N, K):
            compute_dtype, meta_dtype = held.compute_dtype, self.scale.dtype
            place, bias = self.W_q.device, self.bias is not None
        else:
            error_msgs.append(
                f"size mismatch for {layer}: the checkpoint's weight is [{N}, {K}], "
                f"this layer's [{held.out_features}, {held.in_features}]"
            )
            return False
        self._allocate(replace(metadata, compute_dtype=compute_dtype), meta_dtype, place, bias)
        return True

    def _allocate(
        self, metadata: LayerMetadata, meta_dtype: torch.dtype, device: torch.device, bias: bool
    ) -> None:
        """Sets the description, and makes those parameters anew that do not fit it, codes of 3
        bits in planes."""
        if metadata.settings.view_as_float:
            metadata.check_float_view()
        held = self._parameters["W_q"]
        planes = planes_serve(device)
        if held is not None:
            planes = held.dtype == metadata.held(planes=True)[1]
        self._fit_parameter("W_q", *metadata.held(planes), device)
        self._fit_parameter("scale", metadata.meta_shape, meta_dtype, device)
        self._fit_parameter("zero", metadata.meta_shape, meta_dtype, device)
        if bias and self.bias is None:
            shape = (metadata.out_features,)
            self._fit_parameter("bias", shape, metadata.compute_dtype, device)
        self._metadata = metadata
        self.out_features, self.in_features = metadata.out_features, metadata.in_features
        self._format = metadata.format

    def _fit_parameter(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        held = self._parameters[name]
        if held is None or whole_shape(held) != shape or held.dtype != dtype:
            check_replaceable(held, name, dtype, shape)
            tensor = torch.empty(shape, dtype=dtype, device=device)
            self._parameters[name] = nn.Parameter(tensor, requires_grad=False)


def _metadata_property(key: str) -> property:
    return property(lambda layer: layer.metadata.values()[key], doc=f"hqq's `{key}`.")


# torch.distributed.checkpoint looks up every key of a state_dict as an attribute.
for _key in METADATA_KEYS:
    if _key != "encoded_state_dict" and not hasattr(LinearState, _key):
        setattr(LinearState, _key, _metadata_property(_key))
