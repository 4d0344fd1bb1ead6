"""Whether the packages that a command needs are there."""

from __future__ import annotations

from hqqlora.command.errors import UsageError
from hqqlora.optional_packages import absence, is_installed


def require(*packages: str) -> None:
    """Before the work begins.

    Raises:
        UsageError: one is not installed; names it and the command that installs it.
    """
    for package in packages:
        if not is_installed(package):
            raise UsageError(absence(package))
