"""The checks of an adapter and of what its products hand on, for tensors without data.

See checks.py, whose words and errors these have.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import (
    check,
    check_device,
    check_dtype_beside,
    check_rows,
    name_of,
    rows_of,
    shape_of,
)

MAX_RANK = 256


def _check_rank(name: str, rank: int) -> None:
    check(
        rank <= MAX_RANK,
        lambda: f"the rank of {name} must be at most {MAX_RANK}, got {rank}",
    )


def _check_scaling(scaling: float) -> None:
    check(math.isfinite(scaling), lambda: f"scaling must be finite, got {scaling:g}")


def check_adapter(
    A: Tensor,
    B: Tensor,
    out_features: int,
    in_features: int,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    x_name: str,
    x: Tensor,
    experts: int | None = None,
) -> None:
    """A [R,K] and B [N,R] (of experts: [E,R,K] and [E,N,R]), both float32 or both x's dtype;
    the seed where there is dropout."""
    first = [] if experts is None else [experts]
    comma = "".join(f"{size}, " for size in first)
    check_device("A", A, x.device)
    check_device("B", B, x.device)
    check_dtype_beside("A", A, x_name, x)
    check(
        B.dtype == A.dtype,
        lambda: f"B must have the dtype of A, {name_of(A.dtype)}, got {name_of(B.dtype)}",
    )
    check(
        A.dim() == 2 + len(first)
        and list(A.shape[:-2]) == first
        and A.shape[-1] == in_features,
        lambda: f"A must have shape [{comma}R, in_features = {in_features}], got {shape_of(A)}",
    )
    rank = A.shape[-2]
    _check_rank("A", rank)
    check(
        list(B.shape) == [*first, out_features, rank],
        lambda: f"B must have shape [{comma}{out_features}, {rank}], got {shape_of(B)}",
    )
    _check_scaling(scaling)
    check(
        0 <= dropout < 1,
        lambda: f"dropout must be at least 0 and below 1, got {dropout:g}",
    )
    if seed is not None:
        check_device("seed", seed, x.device)
    if dropout > 0:
        check(seed is not None, lambda: f"dropout = {dropout:g} needs a seed")
        assert seed is not None
        check(
            seed.dtype == torch.int64 and seed.numel() == 1,
            lambda: (
                f"seed must be an int64 tensor of one element, got "
                f"{name_of(seed.dtype)} of shape {shape_of(seed)}"
            ),
        )


def check_given(name: str, given: Tensor, rows: int, rank: int, device: torch.device) -> None:
    """xa or dyb [M,R], as another call has computed it."""
    check_device(name, given, device)
    check(
        given.dtype == torch.float32,
        lambda: f"{name} must be float32, got {name_of(given.dtype)}",
    )
    check(
        given.dim() == 2 and given.shape[0] == rows and given.shape[1] == rank,
        lambda: f"{name} must have shape [{rows}, {rank}], got {shape_of(given)}",
    )


_FACTOR_SHAPES = {"A": ("R", "in_features"), "B": ("out_features", "R")}


def factor_size(name: str, factor: Tensor, dimension: int) -> int:
    """What A [R,K] or B [N,R] says of its own size."""
    check(
        factor.dim() == 2,
        lambda: (
            f"{name} must have shape [{', '.join(_FACTOR_SHAPES[name])}], got "
            f"{shape_of(factor)}"
        ),
    )
    return factor.shape[dimension]


def check_factor(
    name: str, factor: Tensor, width: int, scaling: float, x_name: str, x: Tensor
) -> int:
    """A [R,K] or B [N,R] by itself, of an adapter whose other factor is not read: float32 or
    x's dtype. width: K or N. Returns R."""
    at, rank_at = (1, 0) if name == "A" else (0, 1)
    check_device(name, factor, x.device)
    check_dtype_beside(name, factor, x_name, x)
    shape = [f"{size} = {width}" if size != "R" else size for size in _FACTOR_SHAPES[name]]
    check(
        factor.dim() == 2 and factor.shape[at] == width,
        lambda: f"{name} must have shape [{', '.join(shape)}], got {shape_of(factor)}",
    )
    rank = factor.shape[rank_at]
    _check_rank(name, rank)
    _check_scaling(scaling)
    return rank


def check_saved(
    dy: Tensor,
    x: Tensor | None,
    xa: Tensor | None,
    in_features: int,
    rank: int,
    needs_dA: bool,
    needs_dB: bool,
) -> None:
    """The forward's x and xa, as far as the wanted gradients need them."""
    check(not needs_dA or x is not None, lambda: "dA needs x")
    check(not needs_dB or x is not None or xa is not None, lambda: "dB needs xa or x")
    rows = rows_of(dy)
    if x is not None:
        check_device("x", x, dy.device)
        check_rows("x", x, in_features, "in_features")
        check(
            x.dtype == dy.dtype,
            lambda: f"x must have the dtype of dy, {name_of(dy.dtype)}, got {name_of(x.dtype)}",
        )
        check(
            rows_of(x) == rows,
            lambda: f"x must have as many rows as dy, {rows}, got shape {shape_of(x)}",
        )
    if xa is not None:
        check_given("xa", xa, rows, rank, dy.device)
