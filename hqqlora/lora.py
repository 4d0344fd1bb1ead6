"""LoRALinear: a trainable low-rank update on a frozen quantized layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hqqlora.autograd import lora_linear
from hqqlora.autograd.shared_input import Part
from hqqlora.linear import HQQLinear
from hqqlora.lora_settings import (
    check_initialization,
    checked_alpha,
    checked_dropout,
    checked_rank,
    initialize,
    scaling_of,
)
from hqqlora.shared_projections import SharesInput
from hqqlora.state_encoding import check_dtype

# What merge() changes in the base.
MERGED_KEYS = ("W_q", "scale", "zero", "bias")


class LoRALinear(nn.Module, SharesInput):
    """``y = x W^T + bias + scaling * (drop(x) A^T) B^T`` on a frozen `HQQLinear`.

    A low-rank adapter (LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685). Only `lora_A`
    [r, in_features], `lora_B` [out_features, r] and, if asked for, `lora_bias`
    [out_features] are trained. Forward and backward are one fused operation each; the dropout
    mask is regenerated, not stored, and applies in training only.

    ``scaling`` is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora` (rsLoRA:
    Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732).

        >>> config = BaseQuantizeConfig(nbits=4, group_size=64)
        >>> base = HQQLinear(torch.nn.Linear(128, 256), config, compute_dtype=torch.float32)
        >>> layer = LoRALinear(base, r=8, lora_alpha=16)
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['lora_A', 'lora_B']
    """

    def __init__(
        self,
        base: HQQLinear,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        lora_bias: bool = False,
        dtype: torch.dtype = torch.float32,
        init_lora_weights: bool | str = True,
    ) -> None:
        """Adds an adapter to `base`, on its device.

        Args:
            base: the quantized layer; kept as `base_layer`.
            r: the rank, 1 to 256.
            lora_alpha: the numerator of the scaling.
            lora_dropout: the probability, in [0, 1), that an element of x does not enter the
                adapter, in training.
            use_rslora: divide by sqrt(r) instead of r.
            lora_bias: also train a bias behind B, scaled as the adapter is.
            dtype: of the trained parameters.
            init_lora_weights: as in PEFT. True: A uniform (Kaiming), B zero, so that the layer
                starts as `base` is; "gaussian": A normal, B zero; False: both uniform.

        Raises:
            TypeError: base is not an HQQLinear, r not an integer, dtype not one of the three.
            ValueError: a number is out of range.
        """
        super().__init__()
        if not isinstance(base, HQQLinear):
            raise TypeError(f"a LoRALinear needs an HQQLinear, not {type(base).__name__}")
        base.check_whole()
        check_dtype("dtype", dtype)
        self.r = checked_rank(r)
        self.lora_alpha = checked_alpha(lora_alpha)
        self.lora_dropout = checked_dropout(lora_dropout)
        self.use_rslora = bool(use_rslora)
        self.scaling = scaling_of(self.r, self.lora_alpha, self.use_rslora)
        self.base_layer = base.requires_grad_(False)
        N, K = base.out_features, base.in_features
        self.lora_A = nn.Parameter(torch.empty(self.r, K, dtype=dtype, device=base.device))
        self.lora_B = nn.Parameter(torch.empty(N, self.r, dtype=dtype, device=base.device))
        self.lora_bias: nn.Parameter | None = None
        if lora_bias:
            self.lora_bias = nn.Parameter(torch.empty(N, dtype=dtype, device=base.device))
        # The base as it was before merge(). Buffers, so that they move along; not saved.
        for name in MERGED_KEYS:
            self.register_buffer(f"unmerged_{name}", None, persistent=False)
        self.register_state_dict_post_hook(  # type: ignore[no-untyped-call]
            _save_unmerged
        )
        self._enabled = True
        self._merged = False
        self.reset_lora_parameters(init_lora_weights)

    @torch.no_grad()
    def reset_lora_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Initialises A and B anew, by `init_lora_weights` as in the constructor."""
        check_initialization(init_lora_weights)
        initialize(self.lora_A, self.lora_B, init_lora_weights)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)

    # ---- what it is -----------------------------------------------------------------

    @property
    def in_features(self) -> int:
        """K of the base."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """N of the base."""
        return self.base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """The base's placeholder, for code that reads a layer's shape, dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base_layer.bias

    @property
    def enabled(self) -> bool:
        """Whether the adapter takes part."""
        return self._enabled

    @property
    def merged(self) -> bool:
        """Whether the adapter is in the base's weight."""
        return self._merged

    def extra_repr(self) -> str:
        """What `print(module)` says."""
        text = f"r={self.r}, lora_alpha={self.lora_alpha:g}, scaling={self.scaling:g}"
        if self.lora_dropout > 0:
            text += f", lora_dropout={self.lora_dropout:g}"
        return text + (", merged" if self._merged else "") + ("" if self._enabled else ", off")

    # ---- what it does ---------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_features] in x's dtype for x [..., in_features]."""
        base = self.base_layer
        if self._merged or not self._enabled:
            y: Tensor = base(x)
            return y
        if self.shared_projection is not None:
            shared = self.shared_projection.output(self, x)
            if shared is not None:
                return shared
        return lora_linear(
            x,
            base.packed,
            self._bias_for(x),
            self.lora_A,
            self.lora_B,
            self.scaling,
            self.lora_dropout if self.training else 0.0,
        )

    def shared_part(self, x: Tensor) -> Part | None:
        """What `share_projections` needs of the layer for `x`; None: it computes for itself."""
        if self._merged or not self._enabled or (self.training and self.lora_dropout > 0):
            return None
        base = self.base_layer
        return Part(base.packed, self._bias_for(x), self.lora_A, self.lora_B, self.scaling)

    def enable(self) -> None:
        """Lets the adapter take part (again)."""
        self._enabled = True

    def disable(self) -> None:
        """Leaves the adapter out: the layer is its base.

        Raises:
            RuntimeError: the adapter is merged; unmerge it first.
        """
        if self._merged:
            raise RuntimeError("a merged adapter cannot be disabled: call unmerge() first")
        self._enabled = False

    def delta_weight(self) -> Tensor:
        """``scaling * B A`` [out_features, in_features], float32."""
        return self.scaling * (self.lora_B.float() @ self.lora_A.float())

    @torch.no_grad()
    def merge(self) -> None:
        """Quantizes weight + adapter into the base, with the base's own configuration.

        Rounding to few bits loses part of the adapter; `to_dense` loses nothing. The codes from
        before are kept, so that `unmerge` brings them back bit for bit, and so that this
        layer's state_dict is the same, merged or not; loading one unmerges.

        Raises:
            RuntimeError: the adapter is already merged, or disabled.
            ValueError: the adapter is not finite; nothing is changed.
        """
        if self._merged or not self._enabled:
            raise RuntimeError(f"the adapter is {'merged already' if self._merged else 'off'}")
        base = self.base_layer
        before = {name: base._parameters[name] for name in MERGED_KEYS}
        merged = base.dequantize(torch.float32).add_(self.delta_weight())
        for name, parameter in before.items():
            setattr(self, f"unmerged_{name}", None if parameter is None else parameter.data)
        try:
            base.requantize(merged)
        except BaseException:
            self._forget_unmerged()
            raise
        if self.lora_bias is not None:
            base.bias = nn.Parameter(self._total_bias().to(base.compute_dtype), False)
        self._merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Brings the base back as it was before `merge`, bit for bit.

        Raises:
            RuntimeError: the adapter is not merged.
        """
        if not self._merged:
            raise RuntimeError("the adapter is not merged")
        base = self.base_layer
        for name in MERGED_KEYS:
            before = getattr(self, f"unmerged_{name}")
            parameter = None if before is None else nn.Parameter(before, requires_grad=False)
            base._parameters[name] = parameter
        self._forget_unmerged()
        self._merged = False

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An nn.Linear with weight + adapter, added in float32 and rounded once to `dtype`
        (None: the base's compute_dtype). Nothing is quantized."""
        base = self.base_layer
        dtype = dtype or base.compute_dtype
        weight = base.dequantize(torch.float32)
        bias: Tensor | None = base.bias
        if self._enabled and not self._merged:
            weight = weight.add_(self.delta_weight())
            bias = bias if self.lora_bias is None else self._total_bias()
        dense = nn.Linear(
            base.in_features, base.out_features, bias=bias is not None, device="meta"
        )
        dense.weight = nn.Parameter(weight.to(dtype))
        if bias is not None:
            dense.bias = nn.Parameter(bias.to(dtype, copy=True))
        return dense.train(self.training)

    # ---- checkpoints ----------------------------------------------------------------

    def _load_from_state_dict(self, *arguments: Any) -> None:
        if self._merged:
            self.unmerge()
        super()._load_from_state_dict(*arguments)

    # ---- parts ----------------------------------------------------------------------

    def _bias_for(self, x: Tensor) -> Tensor | None:
        return self.base_layer.bias_for(x) if self.lora_bias is None else self._total_bias()

    def _total_bias(self) -> Tensor:
        """bias + scaling * lora_bias, float32; differentiable."""
        assert self.lora_bias is not None
        own = self.scaling * self.lora_bias.float()
        return own if self.base_layer.bias is None else self.base_layer.bias.float() + own

    def _forget_unmerged(self) -> None:
        for name in MERGED_KEYS:
            setattr(self, f"unmerged_{name}", None)


def _save_unmerged(
    layer: LoRALinear, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """A state_dict hook: puts the base from before `merge` in the place of the merged one,
    which would be adapted twice after loading."""
    if not layer.merged:
        return
    for name in MERGED_KEYS:
        before = getattr(layer, f"unmerged_{name}")
        if before is None:
            state.pop(f"{prefix}base_layer.{name}", None)
        else:
            state[f"{prefix}base_layer.{name}"] = layer.base_layer.stored(name, before)
