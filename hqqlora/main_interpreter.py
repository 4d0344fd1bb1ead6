"""Imported before torch, which never returns from its import in a subinterpreter."""

from __future__ import annotations

import importlib


def check() -> None:
    """Raises ImportError in a subinterpreter."""
    for name in ("_interpreters", "_xxsubinterpreters"):  # Python 3.13 and later, and before
        try:
            interpreters = importlib.import_module(name)
        except ImportError:
            continue
        if interpreters.get_current() != interpreters.get_main():
            raise ImportError(
                "hqqlora cannot be imported in a subinterpreter, as torch cannot: import it in "
                "the main interpreter (with mod_wsgi: WSGIApplicationGroup %{GLOBAL})"
            )
        return


check()
