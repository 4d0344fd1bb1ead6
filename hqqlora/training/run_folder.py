"""The folder that a run writes into: which one, whether it may, and where things are in it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from hqqlora.command.errors import UsageError
from hqqlora.files import check_writable, remove_folder, remove_leavings

DEFAULT_NAME = "hqqlora-run"


class RunFolder:
    """Paths in the output folder. A finished run has a log; an unfinished one a checkpoint."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Names a folder; nothing is touched yet."""
        self.path = Path(path)
        self.adapter = self.path / "adapter"
        self.best_adapter = self.path / "adapter-best"
        self._adapters = (self.adapter, self.best_adapter)
        self.log = self.path / "train_log.json"
        self.curve = self.path / "loss.png"
        self.importance = self.path / "importance.safetensors"
        self.checkpoint = self.path / "checkpoint.pt"
        self._created = False

    @property
    def finished(self) -> bool:
        """Whether a run has ended here."""
        return self.log.exists()

    @property
    def unfinished(self) -> bool:
        """Whether a run can be continued here."""
        return self.checkpoint.exists() and not self.finished

    def claim(self, *, overwrite: bool) -> None:
        """Makes the folder if need be, and sees that it can be written and is free.

        Raises:
            UsageError: it holds a run already, or cannot be written.
        """
        if self.unfinished and not overwrite:
            raise UsageError(
                f"{self.path} holds an unfinished run: --resume continues it, --overwrite "
                "starts again"
            )
        if (self.finished or self.adapter.exists()) and not overwrite:
            raise UsageError(
                f"{self.path} holds a finished run: choose another --output, or --overwrite"
            )
        self.check_writable()

    def check_writable(self) -> None:
        """Makes the folder if need be, and sees that it can be written.

        Raises:
            UsageError: that fails.
        """
        try:
            if not self.path.exists():
                self.path.mkdir(parents=True)
                self._created = True
            check_writable(self.path)
            for file in (self.log, self.curve, self.checkpoint, *self._adapters):
                remove_leavings(file)  # of a run that was killed
        except OSError as error:
            self.release()
            reason = os.strerror(error.errno or 0)
            raise UsageError(
                f"cannot write into the output folder {self.path}: {reason}"
            ) from error

    def clear_results(self, *, but_best: bool) -> None:
        """Removes what an earlier run has ended with here, and nothing else. The log, by which
        the run counts as finished, goes first. `but_best`: the best adapter is this run's."""
        for file in (self.log, self.curve, self.importance):
            file.unlink(missing_ok=True)
        for adapter in self._adapters:
            if adapter.is_dir() and not (but_best and adapter == self.best_adapter):
                remove_folder(adapter)

    def clear_best(self) -> None:
        """Removes the best adapter, where there is one."""
        if self.best_adapter.is_dir():
            remove_folder(self.best_adapter)

    def release(self) -> None:
        """Removes the folder again if this run made it and nothing is in it."""
        if self._created:
            with suppress(OSError):
                self.path.rmdir()


def choose_folder(output: str | None, *, resume: bool) -> RunFolder:
    """The folder of `--output`; without it the first hqqlora-run[-n] that does not exist or,
    to resume, the last one that does.

    Raises:
        UsageError: there is nothing to resume there.
    """
    if output is None:
        existing = _numbered_folders()
        if not resume:
            last = max(existing, default=0)
            return RunFolder(_numbered(last + 1))
        if not existing:
            raise UsageError(f"--resume: there is no {DEFAULT_NAME} here; name it by --output")
        output = _numbered(max(existing))
    folder = RunFolder(output)
    if resume and not (folder.finished or folder.unfinished):
        raise UsageError(f"--resume: {folder.path} holds no checkpoint")
    return folder


def _numbered(number: int) -> str:
    return DEFAULT_NAME if number == 1 else f"{DEFAULT_NAME}-{number}"


def _numbered_folders() -> list[int]:
    """The numbers of the default folders that exist in the current folder."""
    numbers = []
    for path in Path().glob(f"{DEFAULT_NAME}*"):
        suffix = path.name[len(DEFAULT_NAME) :]
        if suffix == "":
            numbers.append(1)
        elif suffix[0] == "-" and suffix[1:].isascii() and suffix[1:].isdigit():
            numbers.append(int(suffix[1:]))
    return numbers
