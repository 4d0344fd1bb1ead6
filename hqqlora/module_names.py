"""Which modules of a model a name, a pattern or a list of them means."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

Number = TypeVar("Number", int, float)

ALL_LINEAR = "all-linear"
# What torch.compile, activation checkpointing and FSDP1 put into names.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def unwrapped(name: str) -> str:
    """The name a module has without the wrappers around it or its parents."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def full_name(module: str, key: str) -> str:
    """The name of what a module has as `key`; "" is the model itself."""
    return f"{module}.{key}" if module else key


def linear_tag(name: str) -> str:
    """What layers of the same kind have in common, and hqq's configurations go by:
    "model.layers.3.self_attn.q_proj" -> "self_attn.q_proj"."""
    return ".".join(
        part
        for part in name.split(".")
        if part not in ("model", "layers") and not part.isnumeric()
    )


def numbers_as_stars(name: str) -> str:
    """What the same tensor or layer is called in all blocks:
    "model.layers.3.mlp.up_proj" -> "model.layers.*.mlp.up_proj"."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` names the module `name` or something it is part of.

    A pattern is a run of whole dot-separated parts, with ``*``, ``?`` and ``[...]`` as in file
    names: "q_proj" means every q_proj, "layers.0" all of layer 0, "mlp.*_proj" both of
    "mlp.up_proj" and "mlp.down_proj", "*" everything.
    """
    parts = name.split(".")
    ends = range(1, len(parts) + 1)
    return any(
        fnmatchcase(".".join(parts[start:end]), pattern) for end in ends for start in range(end)
    )


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """The first of `patterns` that matches `name`."""
    return next((pattern for pattern in patterns if matches(name, pattern)), None)


def is_target(name: str, targets: str | Sequence[str]) -> bool:
    """Whether PEFT's `target_modules` means the module `name`: a string is a regular expression
    for the whole name; a list has whole names or their last parts."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def pattern_value(name: str, patterns: Mapping[str, Number], default: Number) -> Number:
    """What PEFT's `rank_pattern` or `alpha_pattern` says for the module `name`."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def check_pattern(pattern: str, argument: str) -> None:
    """ValueError, naming the argument, if a key of `rank_pattern` or `alpha_pattern` is not a
    regular expression."""
    try:
        pattern_value("", {pattern: 0}, 0)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{argument}: {pattern!r} is not a regular expression: {error}"
        ) from error


def last_parts_or_names(layers: Collection[str], modules: Iterable[str]) -> list[str]:
    """PEFT's `target_modules` for `layers`: the last parts of their names, such as "q_proj", if
    those mean no other of `modules`; otherwise the full names."""
    last_parts = {name.rpartition(".")[2] for name in layers}
    inside = tuple(name + "." for name in layers)
    others = (name for name in modules if name not in layers and not name.startswith(inside))
    if any(name.rpartition(".")[2] in last_parts for name in others):
        return sorted(layers)
    return sorted(last_parts)
