"""The folder that is written: which files of an interrupted run are done, and when all is.

Weights come first, each file whole under its name or not there at all; config.json, without
which nobody takes the folder for a model, comes last. Until then a file of state says of what
source and options the folder is made.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hqqlora.command.checkpoint_folder import CONFIG, INDEX
from hqqlora.command.errors import RunError, UsageError
from hqqlora.command.safetensors_file import FileLayout
from hqqlora.files import naming, replacing_file, write_json

STATE = ".hqqlora-quantize.json"
_LOCK = ".hqqlora-quantize.lock"
_OURS = frozenset((STATE, _LOCK))


class Destination:
    """A folder in the making, which no other process is writing to."""

    def __init__(self, folder: Path, state: Mapping[str, Any]) -> None:
        """See `open_destination`."""
        self.folder = folder
        self._state = state

    def is_done(self, name: str, layout: FileLayout) -> bool:
        """Whether the file is there. It is ours, as the folder's state is, and whole, as it has
        its name; so this looks only at the header and the size."""
        return layout.is_in(self.folder / name)

    def finish(
        self,
        config: Mapping[str, Any],
        index: Mapping[str, Any] | None,
        others: Sequence[Path],
    ) -> None:
        """Writes all that goes with the weights, config.json last, and forgets the state.

        Args:
            config: the model's configuration.
            index: which file each tensor is in; None: there is only one.
            others: files to copy.
        """
        for path in others:
            target = self.folder / path.name
            with replacing_file(target) as temporary, naming(target):
                shutil.copyfile(path, temporary)
        if index is not None:
            write_json(self.folder / INDEX, index)
        write_json(self.folder / CONFIG, config)
        (self.folder / STATE).unlink()


@contextmanager
def open_destination(folder: Path, state: Mapping[str, Any]) -> Iterator[Destination]:
    """Makes the folder, or goes on with what a run of the same `state` has left there.

    Raises:
        UsageError: it holds other things, or was begun with another source or options.
        RunError: another process is writing to it.
        OSError: it cannot be made.
    """
    _check(folder, state)
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _check(folder, state)  # somebody may have been faster
        _remove_unfinished(folder)
        if not (folder / STATE).exists():
            write_json(folder / STATE, state)
        yield Destination(folder, state)


def _check(folder: Path, state: Mapping[str, Any]) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} exists and is not a folder")
    found = {name for name in os.listdir(folder) if not _is_unfinished(name)}
    if STATE not in found:
        if found - _OURS:
            raise UsageError(
                f"{folder} is not empty, and holds no interrupted run: give another folder"
            )
        return
    try:
        begun = json.loads((folder / STATE).read_text(encoding="utf-8"))
        options = dict(begun["options"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / STATE} is damaged: remove the folder") from error
    if begun == json.loads(json.dumps(state)):
        return
    for name, value in state["options"].items():
        if name in options and options[name] != json.loads(json.dumps(value)):
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"{folder} was begun with {option} {_shown(options[name])}, not "
                f"{_shown(value)}: give the same options, or another folder"
            )
    if begun.get("version") != state["version"]:
        raise UsageError(
            f"{folder} was begun by hqqlora {begun.get('version')}, this is "
            f"{state['version']}: give another folder"
        )
    raise UsageError(
        f"{folder} was begun from another model, or from {state['source']} as it was before "
        "it was changed: give another folder"
    )


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "(none)"
    return "none" if value is None else str(value)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / _LOCK
    with naming(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process is writing to {folder}") from None
        except OSError:
            pass  # a file system without locks
        yield
        if not (folder / STATE).exists():
            with suppress(FileNotFoundError):
                path.unlink()
    finally:
        os.close(descriptor)


def _is_unfinished(name: str) -> bool:
    """Whether a process has been killed while it wrote this file (see `hqqlora.files`)."""
    return name.startswith(".") and name.endswith(".tmp")


def _remove_unfinished(folder: Path) -> None:
    for name in os.listdir(folder):
        if _is_unfinished(name):
            with suppress(FileNotFoundError):
                (folder / name).unlink()
