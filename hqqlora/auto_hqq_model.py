"""hqq's own way to quantize, save and load a transformers model, under hqq's names.

A script of hqq's changes one import::

    from hqqlora import AutoHQQHFModel  # was: from hqq.models.hf.base import AutoHQQHFModel

It needs transformers and accelerate, which are imported when a method is called.
"""

from __future__ import annotations

import copy
import errno
import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqqlora.files import creating_folder, write_text
from hqqlora.hqq_checkpoint import (
    WEIGHTS_FILE,
    fill_model,
    module_states,
    read_module_states,
    write_module_states,
)
from hqqlora.linear import HQQLinear
from hqqlora.model import quantize_model
from hqqlora.module_names import linear_tag, numbers_as_stars
from hqqlora.optional_packages import needing

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

Device = torch.device | str | int | None


class AutoHQQHFModel:
    """Quantizes, saves and loads transformers models as hqq's class of this name does.

    What it writes, hqq reads, and the other way round. The layers are this library's, and the
    models go on as others do: `save_pretrained` makes a checkpoint for `from_pretrained`.
    """

    @classmethod
    def quantize_model(
        cls,
        model: nn.Module,
        quant_config: Mapping[str, Any],
        compute_dtype: torch.dtype = torch.float16,
        device: Device = None,
    ) -> nn.Module:
        """Quantizes the linear layers of `model` but "lm_head", in place, and freezes it.

        All else is converted to `compute_dtype`, except buffers that are computed and not
        saved: the frequencies of a rotary embedding keep their float32 (hqq rounds them, too,
        and its logits differ for that).

        Args:
            model: a transformers model.
            quant_config: one configuration, as hqq's or this library's `BaseQuantizeConfig`
                gives it, or one for each tag, such as ``{"self_attn.q_proj": four_bits,
                "mlp.up_proj": two_bits}``: then layers without a tag, or with None, stay dense.
                `setup_model` finds the tags.
            compute_dtype: of the quantized layers and of the rest.
            device: where the model goes. None: the GPU, if there is one, or else the CPU.

        Returns:
            model, in eval mode.

        Raises:
            ValueError, TypeError: as of `hqqlora.quantize_model`; or several devices are given.
        """
        target = _device(device)
        if getattr(model, "hqq_quantized", False):
            warnings.warn("the model is quantized already: nothing is done", stacklevel=2)
            return model
        cls.setup_model(model)
        patterns = _patterns(model, quant_config)
        quantize_model(model, patterns, ("lm_head",), compute_dtype, device=target)
        model.to(target)
        _convert_dense(model, compute_dtype)
        return _as_hqqs(model)

    @classmethod
    def setup_model(cls, model: nn.Module) -> None:
        """Sets ``model.linear_tags``: the name of each linear layer but "lm_head" without
        "model", "layers" and numbers, each once. Configurations go by these."""
        model.linear_tags = sorted({linear_tag(name) for name in _linear_names(model)})  # type: ignore[assignment]

    @classmethod
    def save_quantized(
        cls, model: nn.Module, save_dir: str | os.PathLike[str], verbose: bool = False
    ) -> None:
        """Writes config.json and qmodel.pt, which hqq reads, into the folder `save_dir`. Each
        file is replaced as a whole. (`verbose` is hqq's; nothing is printed.)

        Raises:
            ValueError: the model has adapters, or no quantized layer; nothing is written.
            OSError: the folder cannot be written.
        """
        if not any(isinstance(module, HQQLinear) for module in model.modules()):
            raise ValueError(f"{type(model).__name__} has no quantized layer to save")
        states = module_states(model)
        config: Any = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # each layer's entry describes the layer
        with creating_folder(save_dir) as folder:
            write_text(folder / CONFIG_FILE, config.to_json_string())
            generation: Any = getattr(model, "generation_config", None)
            if generation is not None:
                write_text(folder / GENERATION_FILE, generation.to_json_string())
            write_module_states(states, folder / WEIGHTS_FILE)

    @classmethod
    def from_quantized(
        cls,
        save_dir_or_hub: str | os.PathLike[str],
        compute_dtype: torch.dtype = torch.float16,
        device: Device = None,
        cache_dir: str | os.PathLike[str] | None = "",
        adapter: str | None = None,
        *,
        attn_implementation: str | None = None,
        **hub_options: Any,
    ) -> nn.Module:
        """Loads what `save_quantized` has written, hqq's or this one.

        The model is made from config.json by transformers, without its weights; the file's
        tensors are mapped and never unpickled into more than tensors. Old files are read, too:
        nested metadata, quantized or stacked scales and zeros.

        Args:
            save_dir_or_hub: a folder (in `cache_dir`, if that is given), or a model's name on
                the Hugging Face hub.
            compute_dtype: of the quantized layers, with their scales and zeros, and of the
                rest, except buffers that are computed and not saved.
            device: where the model goes. None: the GPU, if there is one, or else the CPU.
            cache_dir: of the hub's files; "" or None: the usual one.
            adapter: not supported: hqq's own adapter files are not read.
            attn_implementation: transformers' argument.
            hub_options: `revision`, `token` or `local_files_only`.

        Returns:
            the model, frozen, in eval mode.

        Raises:
            OSError: a file is not there, or the hub cannot be reached.
            ImportError: transformers or accelerate is missing.
            ValueError: config.json and qmodel.pt do not fit each other, or a file is damaged;
                names the layer, what is found and what expected.
        """
        if adapter is not None:
            raise ValueError(
                f"adapter={adapter!r} is not supported: hqq's own adapter files are not read"
            )
        target = _device(device)
        weights_file, config_file = (
            _find_file(name, save_dir_or_hub, cache_dir, hub_options)
            for name in (WEIGHTS_FILE, CONFIG_FILE)
        )
        states = read_module_states(weights_file)
        model = _empty_model(config_file, compute_dtype, attn_implementation)
        model.eval()
        fill_model(model, states, compute_dtype, target, weights_file)
        cls.setup_model(model)
        generation_file = Path(config_file).parent / GENERATION_FILE
        if generation_file.exists():
            with needing("AutoHQQHFModel"):
                from transformers import GenerationConfig

            model.generation_config = GenerationConfig.from_pretrained(generation_file.parent)
        return _as_hqqs(model)


class HQQModelForCausalLM(AutoHQQHFModel):
    """hqq's older interface: the model has the methods `quantize_model` and `save_quantized`
    itself, with the arguments of `AutoHQQHFModel` but the first."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> nn.Module:
        """As ``transformers.AutoModelForCausalLM.from_pretrained``."""
        with needing("HQQModelForCausalLM"):
            from transformers import AutoModelForCausalLM

        return cls._with_methods(AutoModelForCausalLM.from_pretrained(*args, **kwargs))

    @classmethod
    def from_quantized(cls, *args: Any, **kwargs: Any) -> nn.Module:
        """As `AutoHQQHFModel.from_quantized`."""
        return cls._with_methods(super().from_quantized(*args, **kwargs))

    @classmethod
    def _with_methods(cls, model: Any) -> nn.Module:
        model.quantize_model = partial(cls.quantize_model, model)
        model.save_quantized = partial(cls.save_quantized, model)
        quantized: nn.Module = model
        return quantized


# ---- quantizing --------------------------------------------------------------------------


def _device(device: object) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, (list, tuple, dict)):
        raise ValueError(
            f"device={device!r}: only one device is supported; for several, use transformers' "
            f"device_map"
        )
    return torch.device(device)  # type: ignore[call-overload, no-any-return]


def _linear_names(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] != "lm_head"
    ]


def _patterns(model: nn.Module, quant_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """hqq's configuration by tags as `hqqlora.quantize_model` takes it, by patterns."""
    names = _linear_names(model)
    tags = {linear_tag(name) for name in names}
    if not tags.intersection(quant_config):
        return quant_config
    for tag in sorted(set(quant_config) - tags):
        warnings.warn(
            f"no linear layer has the tag {tag!r}; there are {sorted(tags)}", stacklevel=3
        )
    patterns = {}
    for name in names:
        patterns[numbers_as_stars(name)] = quant_config.get(linear_tag(name))
    # "layers.*.q" would match "layers.0.cross.q", too: the longer name goes first.
    return dict(sorted(patterns.items(), key=lambda item: -item[0].count(".")))


def _convert_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Converts what is saved and not quantized to `dtype`."""
    for module in model.modules():
        if isinstance(module, HQQLinear):
            continue
        saved: dict[str, Any] = {}
        module._save_to_state_dict(saved, "", keep_vars=True)
        for tensor in saved.values():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def _as_hqqs(model: nn.Module) -> nn.Module:
    """What hqq leaves behind: a frozen model in eval mode that says that it is quantized. To
    transformers it says so, too, for `save_pretrained`, Trainer and PEFT."""
    with needing("AutoHQQHFModel"):
        from transformers import PreTrainedModel

    model.requires_grad_(False)
    model.hqq_quantized = True  # type: ignore[assignment]
    if isinstance(model, PreTrainedModel):
        from hqqlora.transformers import mark_quantized

        mark_quantized(model)
    return model.eval()


# ---- files -------------------------------------------------------------------------------


def _find_file(
    name: str,
    save_dir_or_hub: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str] | None,
    hub_options: Mapping[str, Any],
) -> str:
    """The path of a file of the checkpoint, fetched from the hub if it is not a folder's."""
    with needing("AutoHQQHFModel"):
        from transformers.utils import cached_file

    folder = Path(cache_dir or "", save_dir_or_hub)
    path: str | os.PathLike[str] | None = folder / name
    if not folder.is_dir():
        hub_options = {"cache_dir": cache_dir or None, **hub_options}
        try:
            path = cached_file(str(save_dir_or_hub), name, **hub_options)
        except OSError as error:
            raise OSError(
                f"{save_dir_or_hub} is not a folder, nor did {name} come from the hub: {error}"
            ) from error
    if path is None or not os.path.exists(path):
        raise FileNotFoundError(
            errno.ENOENT, f"{save_dir_or_hub} has no such file", str(path or name)
        )
    return str(path)


def _empty_model(
    config_file: str, dtype: torch.dtype, attn_implementation: str | None
) -> nn.Module:
    """The model that config.json describes: parameters on the meta device, buffers real."""
    with needing("AutoHQQHFModel"):
        import transformers
        from accelerate import init_empty_weights

    config = transformers.AutoConfig.from_pretrained(config_file)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    names = config.architectures or []
    model_class: Any = getattr(transformers, names[0], None) if len(names) == 1 else None
    is_class = isinstance(model_class, type)
    if not (is_class and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(
            f"{config_file}: architectures={names} is not one model class that "
            f"transformers {transformers.__version__} has"
        )
    options = (
        {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    )
    with init_empty_weights():
        model: Any = model_class._from_config(config, dtype=dtype, **options)
    # accelerate makes a parameter anew wherever it is set, also the tied ones.
    model.tie_weights()
    empty: nn.Module = model
    return empty
