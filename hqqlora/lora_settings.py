"""What adapters of layers and of experts share: their numbers, and how A and B begin."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor, nn

from hqqlora.ops.adapter_checks import MAX_RANK


def scaling_of(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """The factor of an adapter: alpha over the rank, or over its root (rsLoRA)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def check_initialization(init_lora_weights: bool | str) -> None:
    """Raises ValueError for what `initialize` does not know."""
    if init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"init_lora_weights={init_lora_weights!r} is not True, False or 'gaussian'"
        )


@torch.no_grad()
def initialize(A: Tensor, B: Tensor, init_lora_weights: bool | str) -> None:
    """A [r, in_features] and B [out_features, r] anew, as PEFT begins."""
    if init_lora_weights == "gaussian":
        nn.init.normal_(A, std=1 / A.size(0))
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if init_lora_weights is False:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    else:
        nn.init.zeros_(B)


def checked_rank(r: object) -> int:
    """r as an int. Raises TypeError or ValueError if it is no rank."""
    if isinstance(r, bool):
        raise TypeError(f"r must be an integer, not {r!r}")
    try:
        rank = operator.index(r)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"r must be an integer, not {r!r}") from None
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"r={rank} is not between 1 and {MAX_RANK}")
    return rank


def checked_alpha(lora_alpha: float) -> float:
    """lora_alpha. Raises ValueError if it is not finite."""
    if not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha={lora_alpha} is not finite")
    return lora_alpha


def checked_dropout(lora_dropout: float) -> float:
    """lora_dropout. Raises ValueError if it is no probability below 1."""
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout={lora_dropout} is not in [0, 1)")
    return float(lora_dropout)
