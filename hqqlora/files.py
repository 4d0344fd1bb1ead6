"""Writing files whole: a reader, also after a crash, finds the old one or the new one."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Lends the name of a temporary file beside `path`. Without an exception it is flushed to
    the disk and renamed to `path`; otherwise it is removed and `path` left as it was.

    Raises:
        OSError: the file cannot be written (no space, no permission, ...); names `path`.
    """
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp"
    try:
        with naming(path):
            # Created here, not by mkstemp, so that the umask decides its permissions.
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            permissions = temporary.stat().st_mode & 0o7777
            with suppress(FileNotFoundError):
                permissions = target.stat().st_mode & 0o7777
        yield temporary
        with naming(path):
            os.chmod(temporary, permissions)  # safetensors puts a 0600 file of its own here
            _flush(temporary)
            os.replace(temporary, target)
            _flush_entries(target.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def creating_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Lends a folder to write files of `path` into.

    If `path` does not exist, that is a temporary folder beside it, renamed to `path` in the
    end: the folder appears with all its files or not at all. If it exists, it is `path`
    itself, and only each file is replaced as a whole.

    Raises:
        OSError: the folder cannot be made; names `path`.
    """
    target = Path(path)
    if target.exists():
        if not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "exists and is not a folder", str(path))
        yield target
        return
    temporary = target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp"
    try:
        with naming(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
        yield temporary
        with naming(path):
            _flush_entries(temporary)
            os.rename(temporary, target)
            _flush_entries(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is not None:
            # Nobody knows the temporary folder's name: say what was to be written.
            error.filename = str(error.filename).replace(str(temporary), str(path))
        raise


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Writes `value` as indented JSON, atomically.

    Raises:
        OSError: as of `replacing_file`.
    """
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    with replacing_file(path) as temporary, naming(path):
        temporary.write_text(text, encoding="utf-8")


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors to one safetensors file, atomically.

    Raises:
        OSError: as of `replacing_file`.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing_file(path) as temporary, naming(path):
        save_file(contiguous, temporary, metadata={"format": "pt"})


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what the system or safetensors says into one OSError that names `path`."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(error.errno or errno.EIO, f"cannot write: {reason}", str(path)) from error
    except SafetensorError as error:
        # safetensors reports the system's error in words alone.
        known = re.search(r"os error (\d+)", str(error))
        number = int(known[1]) if known else errno.EIO
        reason = os.strerror(number) if known else str(error)
        raise OSError(number, f"cannot write: {reason}", str(path)) from error


def _flush_entries(folder: Path) -> None:
    """Waits until a folder's entries are on the disk, on file systems that know this."""
    try:
        _flush(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _flush(path: Path) -> None:
    """Waits until a file's contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
