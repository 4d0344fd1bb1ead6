"""Rotary position embeddings: what GGUF and transformers keep of their scaling.

GGUF stores Llama 3's scaling as a tensor, rope_freqs.weight, of the factors by which the
frequencies are divided; transformers stores the four numbers that these are computed from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hqqlora.gguf.container import GGUFFile, Value

FREQUENCY_FACTORS = "rope_freqs.weight"

# What every Llama 3 has; the fourth number, `factor`, is the largest of the factors.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def parameters_of_file(
    file: GGUFFile, architecture: str, factors: Tensor | None, theta: float, head_dim: int
) -> dict[str, Any]:
    """transformers' `rope_parameters` for a file.

    Raises:
        ValueError: the file scales positions in a way that is not known here.
    """
    kind = file.value(f"{architecture}.rope.scaling.type", "none")
    if factors is not None:
        factors = factors.float().flatten()
        found = {"rope_theta": theta, "rope_type": "llama3", **_LLAMA3}
        found["factor"] = round(float(factors.max()), 3)
        expected = frequency_factors(found, head_dim)
        if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4):
            raise ValueError(
                f"{file.path}: the factors in {FREQUENCY_FACTORS} are not those of Llama 3's "
                f"scaling of positions, the only one supported in this form"
            )
        return found
    if kind == "none":
        return {"rope_theta": theta, "rope_type": "default"}
    if kind == "linear":
        factor = file.value(f"{architecture}.rope.scaling.factor", 1.0)
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    raise ValueError(
        f"{file.path}: positions are scaled by {kind!r}; supported are none, linear "
        f"and Llama 3's"
    )


def values_of_config(
    rope: Mapping[str, Any], architecture: str, head_dim: int
) -> tuple[dict[str, Value], Tensor | None]:
    """GGUF's values, and the factors for `FREQUENCY_FACTORS` where there are any, for
    transformers' `rope_parameters`.

    Raises:
        ValueError: llama.cpp scales positions otherwise.
    """
    kind = rope.get("rope_type", "default")
    values = {f"{architecture}.rope.freq_base": Value("FLOAT32", float(rope["rope_theta"]))}
    if kind == "llama3":
        return values, frequency_factors(rope, head_dim)
    if kind == "linear":
        values[f"{architecture}.rope.scaling.type"] = Value("STRING", "linear")
        factor = Value("FLOAT32", float(rope["factor"]))
        values[f"{architecture}.rope.scaling.factor"] = factor
    elif kind != "default":
        raise ValueError(
            f"rope_type={kind!r} cannot be stored as GGUF; supported are default, linear and "
            f"llama3"
        )
    return values, None


def frequency_factors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """Llama 3's factors [head_dim / 2], float32: 1 for short waves, `factor` for long ones,
    and between them a smooth way from one to the other."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    turns = (
        rope["original_max_position_embeddings"]
        / (2 * math.pi)
        * rope["rope_theta"] ** -exponents
    )
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors.float()
