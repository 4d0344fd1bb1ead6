"""Something to do when a module of another package is imported, before hqqlora or after it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def when_imported(module: str, then: Callable[[], None]) -> None:
    """Calls `then` now if `module` is imported already; otherwise once, right after its import.
    Only the first call for a module that is still to be imported counts."""
    if module in sys.modules:
        then()
    elif not any(isinstance(f, _Finder) and f.module == module for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder(module, then))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module where the other finders do, and has it loaded by `_Loader`. Asking
    whether it is there, as ``importlib.util.find_spec`` does, calls nothing."""

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self.module = module
        self.then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of the module; None for all others."""
        if fullname != self.module:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Loads as `loader` does, then calls. Leaves `loader` in its place in the module."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """What `loader` makes."""
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Executes the module; once that has succeeded, removes the finder and calls."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
            self.finder.then()

    def __getattr__(self, name: str) -> Any:
        # For those who ask a spec's loader for more, such as a file's name.
        if name in ("loader", "finder"):
            raise AttributeError(name)
        return getattr(self.loader, name)
