"""Connects PEFT when it is imported, whether that is before hqqlora or after it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

PACKAGE = "peft"


def install() -> None:
    """Connects PEFT now if it is imported already; otherwise right after its import."""
    if PACKAGE in sys.modules:
        _enable()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _enable() -> None:
    """Whoever imports PEFT wants PEFT, and perhaps no quantized layer: it must not fail."""
    from hqqlora.peft import enable

    try:
        enable()
    except (ImportError, AttributeError) as error:
        version = getattr(sys.modules.get(PACKAGE), "__version__", "of unknown version")
        warnings.warn(
            f"hqqlora cannot connect to peft {version}, which will take quantized layers for "
            f"dense ones and fail on them: {error}",
            stacklevel=2,
        )


class _Finder(importlib.abc.MetaPathFinder):
    """Finds PEFT where the other finders do, and has it loaded by `_Loader`. Asking whether
    PEFT is there, as ``importlib.util.find_spec`` does, connects nothing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of PEFT; None for all other modules."""
        if fullname != PACKAGE:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Loads as `loader` does, then connects. Leaves `loader` in its place in the module."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """What `loader` makes."""
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Executes PEFT; once that has succeeded, removes the finder and connects."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Finder)]
        _enable()

    def __getattr__(self, name: str) -> Any:
        # For those who ask a spec's loader for more, such as a file's name.
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)
