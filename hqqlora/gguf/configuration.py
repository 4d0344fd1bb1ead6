"""The configuration of a model in a GGUF file, held against the file's tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from hqqlora.gguf.architectures import Architecture
from hqqlora.gguf.container import FileTensor, GGUFFile
from hqqlora.gguf.rope import FREQUENCY_FACTORS, parameters_of_file
from hqqlora.optional_packages import needing


def read_config(
    file: GGUFFile, architecture: Architecture, read_tensor: Callable[[FileTensor], Tensor]
) -> Any:
    """transformers' configuration, as transformers reads it, and what it leaves out.

    The numbers that decide how much is made are compared with the tensors before anything is.

    Raises:
        ValueError: transformers cannot read it, or it does not fit the tensors; says what the
            file says and what it holds.
    """
    with needing("load_gguf"):
        from transformers import AutoConfig

    _check_layers(file, architecture)
    try:
        config = AutoConfig.from_pretrained(
            file.path.parent,
            gguf_file=file.path.name,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # transformers trusts the file, and raises what it meets
        raise ValueError(
            f"{file.path}: transformers cannot read the configuration: "
            f"{type(error).__name__}: {error}"
        ) from error
    _check_widths(file, config)
    head_dim = _head_dim(file, architecture, config)
    factors = file.tensors.get(FREQUENCY_FACTORS)
    config.rope_parameters = parameters_of_file(
        file,
        architecture.name,
        None if factors is None else read_tensor(factors),
        config.rope_parameters["rope_theta"],
        head_dim,
    )
    config._name_or_path = str(file.path)
    return config


def _check_layers(file: GGUFFile, architecture: Architecture) -> None:
    parts = file.value("split.count", 1)
    if parts != 1:
        raise ValueError(f"{file.path} is one of {parts} parts: merge them (llama-gguf-split)")
    numbers = {re.match(r"blk\.(\d+)\.", name) for name in file.tensors}
    held = {int(number[1]) for number in numbers if number}
    said = file.value(f"{architecture.name}.block_count")
    if not isinstance(said, int) or held != set(range(min(said, len(held) + 1))):
        raise ValueError(
            f"{file.path} says that it has {said} layers, but holds tensors of {len(held)}"
        )


def _check_widths(file: GGUFFile, config: Any) -> None:
    for name, shape in (
        ("token_embd.weight", (config.vocab_size, config.hidden_size)),
        ("blk.0.ffn_up.weight", (config.intermediate_size, config.hidden_size)),
    ):
        tensor = _tensor(file, name)
        if tensor.shape != shape:
            raise ValueError(
                f"{file.path}: tensor {name!r} is {list(tensor.shape)}, but the configuration "
                f"calls for {list(shape)}"
            )


def _tensor(file: GGUFFile, name: str) -> FileTensor:
    if name not in file.tensors:
        raise ValueError(f"{file.path} lacks the tensor {name!r}")
    return file.tensors[name]


def _head_dim(file: GGUFFile, architecture: Architecture, config: Any) -> int:
    """The width of a head, set in the configuration where the file states it: transformers
    does not read it of all architectures."""
    stated = file.value(f"{architecture.name}.attention.key_length")
    if stated is not None:
        if not isinstance(stated, int):
            raise ValueError(f"{file.path}: the width of a head is a {type(stated).__name__}")
        config.head_dim = stated
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    width: Any = getattr(config, "head_dim", None)
    if width is None and heads["q"]:
        width = config.hidden_size // heads["q"]
    for role, count in heads.items():
        name = f"blk.0.attn_{role}.weight"
        rows = _tensor(file, name).shape[0]
        if count * width != rows:
            raise ValueError(
                f"{file.path} says that it has {count} heads of {width} for {role}, but tensor "
                f"{name!r} has {rows} rows"
            )
    return int(width)
