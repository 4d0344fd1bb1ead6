"""LoRAExpertWeights: a trainable low-rank update for each expert of a frozen mixture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hqqlora.autograd import grouped_lora_linear
from hqqlora.expert_weights import HQQExpertWeights
from hqqlora.lora_settings import (
    check_initialization,
    checked_alpha,
    checked_dropout,
    checked_rank,
    initialize,
    scaling_of,
)
from hqqlora.state_encoding import check_dtype


class LoRAExpertWeights(nn.Module):
    """``y[m] = W_e x[m] + scaling * B_e A_e drop(x[m])`` for each row m and its expert e.

    Only `lora_A` [E, r, in_features] and `lora_B` [E, out_features, r] are trained; an expert
    without rows gets a gradient of zero. ``scaling`` is lora_alpha / r, or lora_alpha / sqrt(r)
    with `use_rslora`.
    """

    # As `LoRALinear` has it; there is none here.
    lora_bias = None

    def __init__(
        self,
        base: HQQExpertWeights,
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
            base: the quantized weights of E experts; kept as `base_layer`.
            r, lora_alpha, lora_dropout, use_rslora, dtype, init_lora_weights: as in
                `LoRALinear`, of each expert's adapter.
            lora_bias: must be False.

        Raises:
            TypeError: base is not an HQQExpertWeights, r not an integer, dtype not one of the
                three.
            ValueError: a number is out of range; or lora_bias is set: experts take none.
        """
        super().__init__()
        if not isinstance(base, HQQExpertWeights):
            raise TypeError(
                f"a LoRAExpertWeights needs an HQQExpertWeights, not {type(base).__name__}"
            )
        check_dtype("dtype", dtype)
        if lora_bias:
            raise ValueError("lora_bias=True is not supported for the weights of experts")
        self.r = checked_rank(r)
        self.lora_alpha = checked_alpha(lora_alpha)
        self.lora_dropout = checked_dropout(lora_dropout)
        self.use_rslora = bool(use_rslora)
        self.scaling = scaling_of(self.r, self.lora_alpha, self.use_rslora)
        self.base_layer = base.requires_grad_(False)
        E, N, K = base.weight.shape
        self.lora_A = nn.Parameter(torch.empty(E, self.r, K, dtype=dtype, device=base.device))
        self.lora_B = nn.Parameter(torch.empty(E, N, self.r, dtype=dtype, device=base.device))
        self.reset_lora_parameters(init_lora_weights)

    @torch.no_grad()
    def reset_lora_parameters(self, init_lora_weights: bool | str = True) -> None:
        """A and B anew by `init_lora_weights`, each expert's as `LoRALinear` does."""
        check_initialization(init_lora_weights)
        for A, B in zip(self.lora_A, self.lora_B, strict=True):
            initialize(A, B, init_lora_weights)

    @property
    def in_features(self) -> int:
        """K of the base."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """N of the base."""
        return self.base_layer.out_features

    @property
    def num_experts(self) -> int:
        """E of the base."""
        return self.base_layer.num_experts

    @property
    def weight(self) -> Tensor:
        """The base's placeholder, for code that reads a shape, dtype or device."""
        return self.base_layer.weight

    @property
    def merged(self) -> bool:
        """False: adapters of experts are not merged."""
        return False

    def extra_repr(self) -> str:
        """What `print(module)` says."""
        text = f"r={self.r}, lora_alpha={self.lora_alpha:g}, scaling={self.scaling:g}"
        return text + (f", lora_dropout={self.lora_dropout:g}" if self.lora_dropout else "")

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """y [M, out_features] for rows x [M, in_features] sorted by expert, of which expert e
        has offsets[e] to offsets[e + 1] - 1."""
        return grouped_lora_linear(
            x,
            self.base_layer.packed,
            offsets,
            self.lora_A,
            self.lora_B,
            self.scaling,
            self.lora_dropout if self.training else 0.0,
        )

    def delta_weight(self) -> Tensor:
        """``scaling * B_e A_e`` [E, out_features, in_features], float32."""
        return self.scaling * (self.lora_B.float() @ self.lora_A.float())

    # ---- PEFT's form of the factors -------------------------------------------------

    def peft_factors(self) -> dict[str, Tensor]:
        """A and B as PEFT's adapters of 3-D parameters have them: lora_A [E * r, in_features],
        lora_B [out_features, r * E] with the expert as the faster index."""
        E, r, K = self.lora_A.shape
        return {
            "lora_A": self.lora_A.detach().reshape(E * r, K),
            "lora_B": self.lora_B.detach().permute(1, 2, 0).reshape(-1, r * E),
        }

    @torch.no_grad()
    def set_peft_factors(self, A: Tensor, B: Tensor) -> None:
        """Takes A [E * r, in_features] and B [out_features, r * E], as `peft_factors` gives
        them."""
        E, r, K = self.lora_A.shape
        self.lora_A.copy_(A.reshape(E, r, K))
        self.lora_B.copy_(B.reshape(-1, r, E).permute(2, 0, 1))
