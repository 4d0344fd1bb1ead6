"""How a weight is to be quantized: hqq's configuration dict, and its checked form."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hqqlora.ops.weight import SLOTS_PER_WORD, Solver

SUPPORTED_BITS = tuple(SLOTS_PER_WORD)
SOLVERS = tuple(solver.name.lower() for solver in Solver)

_WEIGHT_KEYS = (
    "nbits",
    "channel_wise",
    "group_size",
    "optimize",
    "round_zero",
    "axis",
    "view_as_float",
)
_FLAT_KEYS = (*_WEIGHT_KEYS, "quant_zero", "quant_scale", "offload_meta", "solver")
_NESTED_KEYS = (
    "weight_quant_params",
    "scale_quant_params",
    "zero_quant_params",
    "offload_meta",
    "solver",
)
_WHY_NOT = {
    "quant_zero": "zeros keep 16 or 32 bits (hqq itself has deprecated quantized zeros)",
    "quant_scale": "scales keep 16 or 32 bits (hqq itself has deprecated quantized scales)",
    "offload_meta": "scale and zero stay with the codes (hqq itself has deprecated offloading)",
}


def BaseQuantizeConfig(  # noqa: N802 (hqq's name)
    nbits: float = 4,
    group_size: int | None = 64,
    quant_zero: bool = False,
    quant_scale: bool = False,
    offload_meta: bool = False,
    view_as_float: bool = False,
    axis: int = 1,
    *,
    solver: str = "default",
    optimize: bool = True,
    round_zero: bool | None = None,
) -> dict[str, Any]:
    """The configuration dict of a quantized layer, the same as ``hqq.BaseQuantizeConfig``'s.

        >>> config = BaseQuantizeConfig(nbits=3, group_size=64)
        >>> config["weight_quant_params"]["nbits"]
        3

    Args:
        nbits: bits of a code: 8, 4, 3, 2 or 1. A whole float such as 4.0 is accepted.
        group_size: weights that share a scale and a zero; must divide out_features *
            in_features of every layer it is used for. None: a whole row (axis 1) or a whole
            column (axis 0).
        quant_zero, quant_scale, offload_meta: must be False; hqq has deprecated all three.
        view_as_float: store ``W_q`` in checkpoints reinterpreted as the compute dtype.
        axis: 1: a group runs along a row; 0: down a column.
        solver: ``"default"``: range search, then least squares; ``"reference"``: what hqq
            0.2.8 computes; ``"minmax"``: the range of each group alone.
        optimize: False is hqq's spelling of the min/max solver.
        round_zero: round the start value of zero. None: hqq's rule, only for 4 bits. The
            default solver has no use for it.

    Raises:
        ValueError, TypeError: a value is not one of those above.
    """
    for name, value in (
        ("quant_zero", quant_zero),
        ("quant_scale", quant_scale),
        ("offload_meta", offload_meta),
    ):
        _refuse_deprecated(name, value)
    bits = _bits(nbits)
    settings = QuantSettings(
        nbits=bits,
        group_size=_group_size(group_size),
        axis=_axis(axis),
        optimize=_boolean("optimize", optimize),
        round_zero=bits == 4 if round_zero is None else _boolean("round_zero", round_zero),
        view_as_float=_boolean("view_as_float", view_as_float),
        solver=_solver(solver),
    )
    return settings.to_config()


@dataclass(frozen=True)
class QuantSettings:
    """A configuration dict whose values have been checked."""

    nbits: int
    group_size: int | None
    axis: int
    optimize: bool
    round_zero: bool
    view_as_float: bool
    solver: str

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> QuantSettings:
        """Checks a configuration dict: nested as ``BaseQuantizeConfig`` gives it, or flat as in
        the ``config.json`` of older checkpoints. A missing value gets hqq's default.

        Raises:
            TypeError: config is not a mapping.
            ValueError: a key is unknown, or a value not supported.
        """
        if not isinstance(config, Mapping):
            raise TypeError(
                f"quant_config must be a dict such as BaseQuantizeConfig() gives, "
                f"not {type(config).__name__}"
            )
        if "weight_quant_params" in config:
            flat = _flatten(config)
        else:
            _refuse_unknown("quant_config", config, _FLAT_KEYS)
            flat = dict(config)
        if not _boolean("channel_wise", flat.pop("channel_wise", True)):
            raise ValueError(
                "channel_wise=False (one scale for a whole matrix) is not supported; "
                "use group_size=None for one scale a row or column"
            )
        return cls._from_checked(BaseQuantizeConfig(**flat))

    @classmethod
    def _from_checked(cls, config: dict[str, Any]) -> QuantSettings:
        values = {k: v for k, v in config["weight_quant_params"].items() if k != "channel_wise"}
        return cls(**values, solver=config.get("solver", "default"))

    def to_config(self) -> dict[str, Any]:
        """A fresh dict in hqq's form; "solver" appears only if it is not the default one."""
        config: dict[str, Any] = {
            "weight_quant_params": {
                "nbits": self.nbits,
                "channel_wise": True,
                "group_size": self.group_size,
                "optimize": self.optimize,
                "round_zero": self.round_zero,
                "axis": self.axis,
                "view_as_float": self.view_as_float,
            },
            "scale_quant_params": None,
            "zero_quant_params": None,
            "offload_meta": False,
        }
        if self.solver != "default":
            config["solver"] = self.solver
        return config

    def group_size_for(self, out_features: int, in_features: int, layer: str = "") -> int:
        """The group size for a weight [out_features, in_features], with None resolved.

        Raises:
            ValueError: the weight is empty, or the group size does not divide it. The message
                names `layer`, the shape and the group size.
        """
        elements = out_features * in_features
        shape = f"weight [{out_features}, {in_features}]"
        where = f"{layer}: " if layer else ""
        if elements <= 0:
            raise ValueError(f"{where}an empty {shape} cannot be quantized")
        if self.group_size is None:
            return in_features if self.axis == 1 else out_features
        if elements % self.group_size:
            raise ValueError(
                f"{where}group_size={self.group_size} does not divide the {elements} "
                f"elements of a {shape}"
            )
        return self.group_size

    @property
    def effective_solver(self) -> str:
        """The solver that runs: optimize=False means min/max, whatever `solver` says."""
        return self.solver if self.optimize else "minmax"


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_unknown("quant_config", config, _NESTED_KEYS)
    weight = config["weight_quant_params"]
    if not isinstance(weight, Mapping):
        raise ValueError(f"weight_quant_params must be a dict, not {type(weight).__name__}")
    _refuse_unknown("weight_quant_params", weight, _WEIGHT_KEYS)
    flat = dict(weight)
    flat["quant_scale"] = config.get("scale_quant_params") is not None
    flat["quant_zero"] = config.get("zero_quant_params") is not None
    flat["offload_meta"] = bool(config.get("offload_meta", False))
    flat["solver"] = config.get("solver", "default")
    return flat


def _refuse_unknown(where: str, config: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(str(key) for key in config if key not in known)
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; known are {sorted(known)}")


def _refuse_deprecated(name: str, value: object) -> None:
    if value:
        raise ValueError(f"{name}={value!r} is not supported: {_WHY_NOT[name]}")


def _whole(name: str, value: object) -> int:
    """An integer, also one given as a float (4.0), as hqq's checkpoints may."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None


def _bits(nbits: object) -> int:
    supported = "supported are " + ", ".join(map(str, SUPPORTED_BITS))
    if nbits in (5, 6):
        raise ValueError(
            f"nbits={nbits} is not supported: hqq stores 5 and 6 bits in whole bytes, "
            f"so use nbits=8; {supported}"
        )
    if isinstance(nbits, float) and 1 < nbits < 2:
        raise ValueError(
            f"nbits={nbits} is not supported: hqq stores 1.58 bits in 2 bits, "
            f"so use nbits=2; {supported}"
        )
    bits = _whole("nbits", nbits)
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"nbits={bits} is not supported; {supported}")
    return bits


def _group_size(group_size: object) -> int | None:
    if group_size is None:
        return None
    size = _whole("group_size", group_size)
    if size < 1:
        raise ValueError(
            f"group_size={size} must be positive, or None for whole rows or columns"
        )
    return size


def _axis(axis: object) -> int:
    value = _whole("axis", axis)
    if value not in (0, 1):
        raise ValueError(f"axis={value} must be 1 (groups along rows) or 0 (down columns)")
    return value


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return value


def _solver(solver: object) -> str:
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is not one of {', '.join(SOLVERS)}")
    return str(solver)
