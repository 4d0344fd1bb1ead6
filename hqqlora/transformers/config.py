"""HqqConfig: what a model is to be quantized with, as transformers' users know it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from hqqlora.config import BaseQuantizeConfig, QuantSettings

_STORED_KEYS = ("quant_config", "quant_method", "skip_modules")
_ENTRY_KEYS = (
    "nbits",
    "group_size",
    "quant_zero",
    "quant_scale",
    "offload_meta",
    "view_as_float",
    "axis",
    "solver",
    "optimize",
    "round_zero",
)
# What checkpoints of old may say about their scales and zeros. The tensors themselves tell.
_ABOUT_META = ("quant_zero", "quant_scale", "offload_meta")


class HqqConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How ``from_pretrained(..., quantization_config=HqqConfig(...))`` quantizes a model.

    Takes what ``transformers.HqqConfig`` took in version 4::

        HqqConfig(nbits=4, group_size=64)
        HqqConfig(dynamic_config={"attn": {"nbits": 4}, "mlp": {"nbits": 2, "group_size": 32}})

    `quant_config` is the configuration as hqq's dict, or with `dynamic_config` one such dict
    for each of its keys; `skip_modules` a list.
    """

    def __init__(
        self,
        nbits: float = 4,
        group_size: int | None = 64,
        view_as_float: bool = False,
        axis: int | None = None,
        dynamic_config: Mapping[str, Mapping[str, Any] | None] | None = None,
        skip_modules: Sequence[str] | None = ("lm_head",),
        *,
        quant_zero: bool = False,
        quant_scale: bool = False,
        offload_meta: bool = False,
        solver: str = "default",
        optimize: bool = True,
        round_zero: bool | None = None,
        importance: Mapping[str, Tensor] | None = None,
        **unknown: Any,
    ) -> None:
        """Checks everything that can be checked without a model.

        Args:
            nbits, group_size, view_as_float, quant_zero, quant_scale, offload_meta, solver,
                optimize, round_zero: as in `hqqlora.BaseQuantizeConfig`.
            axis: 1: a group runs along a row; 0: down a column; None: 1.
            dynamic_config: a configuration for each key; what it leaves out is as in the other
                arguments; None leaves the layers dense, and so does no key. A key is a layer's
                tag, that is its name without "model", "layers" and numbers
                ("self_attn.q_proj"), or a pattern for names as in `hqqlora.quantize_model`
                ("mlp", "layers.0", "*_proj"), where "attn" means attention under any name
                ("self_attn", "attention", "SelfAttention"). A tag is stronger than
                `skip_modules`, which are stronger than patterns; of the patterns the first
                that matches decides.
            skip_modules: tags or patterns of layers to leave dense.
            importance: how much an error in each column of a layer counts, by the layers'
                names in the model, as `hqqlora.input_importance` gives it for the dense one;
                layers it does not name, and experts, are quantized without. Not stored.

        Raises:
            TypeError: an argument is unknown, or has another type.
            ValueError: a value is not supported; names the key of `dynamic_config`.
        """
        if unknown:
            raise TypeError(
                f"HqqConfig has no arguments {sorted(unknown)}; it has "
                f"{sorted((*_ENTRY_KEYS, 'dynamic_config', 'importance', 'skip_modules'))}"
            )
        values = {
            "nbits": nbits,
            "group_size": group_size,
            "view_as_float": view_as_float,
            "axis": 1 if axis is None else axis,
            "quant_zero": quant_zero,
            "quant_scale": quant_scale,
            "offload_meta": offload_meta,
            "solver": solver,
            "optimize": optimize,
            "round_zero": round_zero,
        }
        self.quant_method = QuantizationMethod.HQQ
        self.quant_config: dict[str, Any] = BaseQuantizeConfig(**values)  # type: ignore[arg-type]
        if dynamic_config is not None:
            self.quant_config = _per_key(dynamic_config, values)
        self.skip_modules = _names("skip_modules", skip_modules)
        self.importance = importance

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The configuration of a ``config.json``'s "quantization_config", also an old one, or
        of a dict of keyword arguments.

        A stored one has "quant_config": nested as hqq has it, flat as in old checkpoints, or a
        dict of those. That it says of quantized scales or zeros is left to the tensors.

        Raises:
            ValueError, TypeError: a key is unknown, or a value not supported.
        """
        values = dict(config_dict)
        method = values.get("quant_method", QuantizationMethod.HQQ)
        if method != QuantizationMethod.HQQ:
            raise ValueError(f"quant_method is {method!r}, not 'hqq'")
        if "quant_config" in values:
            config = cls._from_stored(values)
        else:
            values.pop("quant_method", None)
            config = cls(**values)
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def _from_stored(cls, values: Mapping[str, Any]) -> HqqConfig:
        unknown = sorted(str(key) for key in values if key not in _STORED_KEYS)
        if unknown:
            raise ValueError(
                f"quantization_config has unknown keys {unknown}; known are "
                f"{sorted(_STORED_KEYS)}"
            )
        config = cls(skip_modules=values.get("skip_modules", ("lm_head",)))
        stored = values["quant_config"]
        if not isinstance(stored, Mapping):
            raise TypeError(f"quant_config must be a dict, not {type(stored).__name__}")
        if is_per_key(stored):
            config.quant_config = {
                key: None if value is None else _stored_settings(value, key)
                for key, value in stored.items()
            }
        else:
            config.quant_config = _stored_settings(stored, None)
        return config

    @classmethod
    def of(cls, config: Any) -> HqqConfig:
        """An own copy of `config`: one of these, a dict, or transformers' own HqqConfig."""
        if isinstance(config, cls):
            return copy.deepcopy(config)
        stored = config if isinstance(config, Mapping) else config.to_dict()
        converted: HqqConfig = cls.from_dict(stored)
        return converted

    def to_dict(self) -> dict[str, Any]:
        """What stands in ``config.json``, as hqq and vLLM read it."""
        config = copy.deepcopy(self.quant_config)
        for entry in config.values() if is_per_key(config) else (config,):
            if entry is not None:
                entry.pop("solver", None)
        return {
            "quant_config": config,
            "quant_method": self.quant_method,
            "skip_modules": list(self.skip_modules),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict` without what is as by default, but with "quant_method"."""
        default = HqqConfig().to_dict()
        return {
            key: value
            for key, value in self.to_dict().items()
            if key == "quant_method" or value != default[key]
        }


def is_per_key(config: Mapping[str, Any]) -> bool:
    """Whether a "quant_config" is one of several configurations under keys."""
    return (
        bool(config)
        and "weight_quant_params" not in config
        and all(value is None or isinstance(value, Mapping) for value in config.values())
    )


def _per_key(
    dynamic_config: Mapping[str, Mapping[str, Any] | None], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    if not isinstance(dynamic_config, Mapping) or not dynamic_config:
        raise TypeError(
            f"dynamic_config must be a dict of configurations, not {dynamic_config!r}"
        )
    return {key: _entry(key, value, defaults) for key, value in dynamic_config.items()}


def _entry(
    key: str, value: Mapping[str, Any] | None, defaults: Mapping[str, Any]
) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(
            f"dynamic_config[{key!r}] must be a dict or None, not {type(value).__name__}"
        )
    try:
        if "weight_quant_params" in value:
            return QuantSettings.parse(value).to_config()
        unknown = sorted(str(name) for name in value if name not in _ENTRY_KEYS)
        if unknown:
            raise ValueError(f"unknown keys {unknown}; known are {sorted(_ENTRY_KEYS)}")
        return BaseQuantizeConfig(**{**defaults, **value})
    except (TypeError, ValueError) as error:
        raise type(error)(f"dynamic_config[{key!r}]: {error}") from error


def _stored_settings(stored: Mapping[str, Any], key: str | None) -> dict[str, Any]:
    """The configuration that a ``config.json`` has, in hqq's form."""
    if "weight_quant_params" in stored:
        weight = {"weight_quant_params": stored["weight_quant_params"]}
        about_meta = {"scale_quant_params", "zero_quant_params", "offload_meta"}
        rest = {name: value for name, value in stored.items() if name not in about_meta}
        stored = {**rest, **weight}
    else:
        stored = {name: value for name, value in stored.items() if name not in _ABOUT_META}
    try:
        return QuantSettings.parse(stored).to_config()
    except (TypeError, ValueError) as error:
        where = "quant_config" if key is None else f"quant_config[{key!r}]"
        raise type(error)(f"{where}: {error}") from error


def _names(argument: str, names: Sequence[str] | None) -> list[str]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names or ()):
        raise TypeError(f"{argument} must be a list of names, not {names!r}")
    return list(names or ())
