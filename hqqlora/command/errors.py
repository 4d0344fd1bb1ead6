"""What a run says when it cannot go on: one line, and the exit code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


class RunError(Exception):
    """A reason to stop that its reader can act on. Printed as one line, without a traceback."""

    exit_code = 1
    again = True  # whether the same command, resumed, could get further

    def add_hint(self, hint: str) -> None:
        """Adds, to the same line, what to do next."""
        self.args = (f"{self}; {hint}",)


class UsageError(RunError):
    """The options, or the files they name, are at fault."""

    exit_code = 2
    again = False


class DivergedError(RunError):
    """The loss is not finite any more."""

    again = False


class StopRequestedError(RunError):
    """Somebody asked the run to end: Ctrl-C (130), or a request to terminate (143)."""

    def __init__(self, message: str, signal_number: int = 2) -> None:
        """The exit code is a shell's for a process that the signal ended."""
        super().__init__(message)
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def describe(error: OSError) -> str:
    """What went wrong with which file."""
    if error.strerror is None:
        return first_line(error)
    return error.strerror + (f": {error.filename}" if error.filename else "")


@contextmanager
def explaining(what: str, kind: type[RunError] = UsageError) -> Iterator[None]:
    """Turns any exception inside into one line that begins with `what`.

    For calls into libraries that raise what they like: transformers raises OSError,
    ValueError, KeyError, ImportError and more for a model folder it cannot read.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        raise kind(f"{what}: {first_line(error)}") from error


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError into a RunError: a full disk is not the command line's fault."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        # hqqlora.files says so itself
        said = reason.startswith("cannot write")
        raise RunError(describe(error) if said else f"cannot write {path}: {reason}") from error
