"""HQQLinear: a linear layer whose frozen weight is stored in 8 to 1 bits, in hqq's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hqqlora.autograd import linear
from hqqlora.config import QuantSettings
from hqqlora.hqq_layers import from_hqq, to_hqq
from hqqlora.linear_state import LinearState
from hqqlora.ops import PackedWeight
from hqqlora.planes import packed_like
from hqqlora.quantizing import quantize_weight
from hqqlora.state_encoding import TENSOR_KEYS, LayerMetadata, check_dtype

if TYPE_CHECKING:
    from hqqlora.distributed.tensor_parallel import WeightPart

NO_WEIGHT = "this HQQLinear has no weight yet: load a state_dict into it"


class HQQLinear(LinearState):
    """``y = x W^T + bias`` with ``W = (W_q - zero) * scale``, all of it frozen.

    The format is that of HQQ, half-quadratic quantization (Badri and Shaji, 2023,
    https://mobiusml.github.io/hqq_blog).

        >>> dense = torch.nn.Linear(128, 256, bias=False)
        >>> layer = HQQLinear(dense, BaseQuantizeConfig(nbits=4), compute_dtype=torch.float32)
        >>> layer.W_q.dtype, layer.W_q.numel()  # two codes in a byte
        (torch.uint8, 16384)
        >>> layer(torch.randn(3, 128)).shape
        torch.Size([3, 256])

    An ordinary module: `W_q` (uint8), `scale`, `zero` and `bias` are parameters that need no
    gradient, so ``.to``, ``.half``, deepcopy and pickle do what they do for any module. The
    gradient flows through to x alone.

    Codes of 3 bits are in planes, exactly 3 bits a weight (`hqqlora.ops.planes_shape`), or in
    hqq's words, int32, where planes do not fit: see `repack`. Loading and the state_dict
    convert them, one layer at a time; a state_dict then has its own copy of such a `W_q`.

    x may be float32, bfloat16 or float16, whatever `compute_dtype` is; y has x's dtype, and a
    bias of another dtype is converted on the way. Sums are kept in float32 and rounded once.

    Its state_dict has hqq's nineteen keys, so that hqq, vLLM and others read it. Loading takes
    hqq's encoded and raw forms; the checkpoint decides bits, group size and axis, the layer
    (once it has a weight) keeps its shape and dtypes. With `state_dict_metadata` False only
    `W_q`, `scale`, `zero` and `bias` are written, for loaders that keep the rest themselves.
    """

    # Of a tensor-parallel layer: which part of which weight it holds (hqqlora.distributed).
    weight_part: WeightPart | None = None

    def __init__(
        self,
        linear_layer: nn.Linear | None,
        quant_config: Mapping[str, Any] | None,
        del_orig: bool = True,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        initialize: bool = True,
        *,
        meta_dtype: torch.dtype | None = None,
        importance: Tensor | None = None,
    ) -> None:
        """Quantizes a dense layer.

        Args:
            linear_layer: the layer to quantize; None: an uninitialised layer, to be loaded.
            quant_config: as ``BaseQuantizeConfig`` gives it; may be None without a layer.
            del_orig: set the dense layer's parameters to None, to free them.
            compute_dtype: what `dequantize` gives and the bias is stored in. None: float16,
                as in hqq; in an uninitialised layer, what the checkpoint says.
            device: where to quantize and live. None: the dense weight's device.
            initialize: False: do not quantize, only make tensors of the right shapes (with a
                layer) for a checkpoint to fill by `load_state_dict` (by setting parameters:
                see `repack`).
            meta_dtype: of scale and zero. None: compute_dtype.
            importance: [in_features], how much an error in each column counts (see
                `hqqlora.input_importance`). None: all the same.

        Raises:
            ValueError: the group size or importance does not fit, the weight is not finite
                (names the element), or the configuration is not supported.
            TypeError: linear_layer is not an nn.Linear, or a dtype is not float32, float16 or
                bfloat16.
        """
        nn.Module.__init__(self)
        for name, dtype in (("compute_dtype", compute_dtype), ("meta_dtype", meta_dtype)):
            if dtype is not None:
                check_dtype(name, dtype)
        settings = None if quant_config is None else QuantSettings.parse(quant_config)
        self._metadata = None
        self._format = None
        self._wanted = (settings, compute_dtype, meta_dtype, device)
        self.state_dict_metadata = True
        self.encoded_state_dict = True
        for name in TENSOR_KEYS:
            self.register_parameter(name, None)
        self.in_features = self.out_features = 0
        if linear_layer is None:
            return
        if settings is None:
            raise ValueError("a quant_config is needed to quantize a layer")
        if not isinstance(linear_layer, nn.Linear) or isinstance(linear_layer, HQQLinear):
            raise TypeError(
                f"linear_layer must be a dense nn.Linear, not {type(linear_layer).__name__}"
            )
        weight = linear_layer.weight
        if weight is None:
            raise TypeError("linear_layer has no weight: it has been quantized and freed")
        self.train(linear_layer.training)
        self._allocate(
            LayerMetadata(
                settings, weight.size(0), weight.size(1), compute_dtype or torch.float16
            ),
            meta_dtype or compute_dtype or torch.float16,
            weight.device if device is None else torch.device(device),
            bias=linear_layer.bias is not None,
        )
        if not initialize:
            return
        self.requantize(weight.detach(), importance)
        if linear_layer.bias is not None:
            self.bias.data.copy_(linear_layer.bias.detach())
        if del_orig:
            for name, _ in list(linear_layer.named_parameters(recurse=False)):
                setattr(linear_layer, name, None)

    @classmethod
    def from_weights(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        quant_config: Mapping[str, Any],
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        del_orig: bool = True,
        *,
        meta_dtype: torch.dtype | None = None,
    ) -> HQQLinear:
        """A layer that quantizes `weight` [out_features, in_features], with `bias`
        [out_features] or None.

        Args:
            weight, bias: float32, bfloat16 or float16; without gradients.
            quant_config, compute_dtype, device, meta_dtype: as in the constructor.
            del_orig: let go of `weight` as soon as it is quantized. The caller's own reference
                stays.

        Raises:
            ValueError: weight has other than two dimensions; or as the constructor does.
        """
        if weight.dim() != 2:
            raise ValueError(
                f"weight must be [out_features, in_features]: {list(weight.shape)}"
            )
        dense = nn.Linear(1, 1, bias=False, device="meta")
        dense.out_features, dense.in_features = weight.shape
        dense.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return cls(dense, quant_config, del_orig, compute_dtype, device, meta_dtype=meta_dtype)

    @classmethod
    def from_hqq(cls, layer: nn.Module) -> HQQLinear:
        """The weight of `layer`, an HQQLinear of the hqq package, which it shares: nothing is
        quantized again, and nothing copied but scales and zeros that hqq had quantized, and
        codes of 3 bits, which are put into planes.

        Raises TypeError if layer is another class, ValueError if it has no weight or a format
        that is not supported.
        """
        return from_hqq(layer)

    def to_hqq(self) -> nn.Module:
        """An HQQLinear of the hqq package, which shares this layer's memory, but for codes of 3
        bits in planes. hqq keeps scale and zero in compute_dtype: if they have another dtype
        here, they are rounded to that.

        Raises ImportError if hqq is not installed, RuntimeError if there is no weight yet.
        """
        return to_hqq(self)

    # ---- what it is -----------------------------------------------------------------

    def is_initialized(self) -> bool:
        """Whether the layer has a weight."""
        return self._metadata is not None

    def check_whole(self) -> None:
        """Raises ValueError if the layer is one rank's part of a weight, of which an adapter
        around it would know nothing."""
        if self.weight_part is not None:
            raise ValueError(
                "the layer is tensor-parallel: add adapters before parallelize_module"
            )

    @property
    def metadata(self) -> LayerMetadata:
        """The checked description of the layer.

        Raises:
            RuntimeError: the layer has no weight yet.
        """
        if self._metadata is None:
            raise RuntimeError(NO_WEIGHT)
        return self._metadata

    @property
    def meta(self) -> dict[str, Any]:
        """hqq's `meta`: scale, zero and the plain values that belong to them."""
        values = self.metadata.values()
        for key in ("offload_meta", "encoded_state_dict", "stores_quant_config"):
            del values[key]
        return {**values, "scale": self.scale, "zero": self.zero}

    @property
    def offload_meta(self) -> bool:
        """False: scale and zero are where the codes are. hqq's layers have this attribute."""
        return False

    @property
    def packed(self) -> PackedWeight:
        """The weight as the operators take it."""
        if self._format is None:
            raise RuntimeError(NO_WEIGHT)
        return PackedWeight(self.W_q, self.scale, self.zero, *self._format)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A placeholder of the dense weight's shape, dtype and device that takes no memory.

        Model code reads those from a linear layer. Its elements are NaN, so that arithmetic
        with it is wrong for all to see, and one element in memory, so that writing raises.
        The numbers are in `dequantize`.
        """
        m = self.metadata
        nan = torch.full((), float("nan"), dtype=m.compute_dtype, device=self.W_q.device)
        placeholder = nan.expand(m.out_features, m.in_features)
        if not torch.compiler.is_compiling():
            # Keeps transformers from initialising it.
            placeholder._is_hf_initialized = True  # type: ignore[attr-defined]
        return placeholder

    def extra_repr(self) -> str:
        """What `print(module)` says."""
        if self._metadata is None:
            return "uninitialized"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nbits={self.nbits}, group_size={self.group_size}, "
            f"axis={self.axis}, compute_dtype={self.compute_dtype}"
        )

    # ---- what it does ---------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_features] in x's dtype for x [..., in_features]."""
        return linear(x, self.packed, self.bias_for(x))

    def bias_for(self, x: Tensor) -> Tensor | None:
        """The bias in a dtype that goes with x: as it is, or else exactly, in float32."""
        if self.bias is None or self.bias.dtype in (x.dtype, torch.float32):
            return self.bias
        return self.bias.float()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [out_features, in_features], computed in float32 and rounded once to
        `dtype` (None: compute_dtype)."""
        dense: Tensor = torch.ops.hqqlora.dequantize(*self.packed, dtype or self.compute_dtype)
        return dense

    @torch.no_grad()
    def requantize(self, weight: Tensor, importance: Tensor | None = None) -> None:
        """Replaces the weight by `weight` [out_features, in_features] (any of float32, float16,
        bfloat16), quantized with this layer's configuration; `importance` as for the
        constructor.

        Raises:
            ValueError: another shape, or an element is not finite; the layer is unchanged.
        """
        m = self.metadata
        if tuple(weight.shape) != (m.out_features, m.in_features):
            raise ValueError(
                f"weight {list(weight.shape)} is not [{m.out_features}, {m.in_features}]"
            )
        W_q, scale, zero = quantize_weight(
            weight.to(self.W_q.device), m.settings, self.scale.dtype, importance
        )
        self.W_q.data = packed_like(self.W_q, W_q, m.format)
        self.scale.data, self.zero.data = scale, zero

    def reset_parameters(self) -> None:
        """Raises RuntimeError: there is no initial value to go back to."""
        raise RuntimeError("an HQQLinear has no initial state: quantize or load one")

    # ---- moving and converting ------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HQQLinear:
        if self._metadata is None:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        converted, before = self._metadata_after(fn), self.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._metadata = converted
        self._repack_after_move(before)
        return self
