"""Writing files whole: a reader, also after a crash, finds the old one or the new one.

What is written goes to a temporary file or folder beside its place, is flushed to the disk, and
then renamed. The flush comes first because a file system may carry out a rename before it has
the data: after a power failure a name would stand for an empty file.

A temporary's writer holds a lock on it. Who writes the same place later takes one that nobody
holds for what a killed process has left behind, and removes it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_STAGING = "hqqlora"  # temporary folders inside a folder that exists are named after it


@contextmanager
def replacing_file(
    path: str | os.PathLike[str], *, follow_link: bool = False
) -> Iterator[Path]:
    """Lends the name of a temporary file beside `path`. Without an exception it is flushed to
    the disk and renamed to `path`; otherwise it is removed and `path` left as it was.

    A symbolic link at `path` is replaced: it may have come with a folder from elsewhere, and
    lead anywhere. `follow_link` is for a path that the user has named; then the file is
    replaced that the link leads to.

    Raises:
        OSError: the file cannot be written (no space, no permission, ...); names `path`.
    """
    target = Path(os.path.realpath(path)) if follow_link else Path(path)
    with _temporary(target, path, _make_file) as temporary:
        yield temporary
        with naming(path):
            _put_in_place(temporary, target)


@contextmanager
def creating_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Lends a temporary folder to write files of `path` into.

    If `path` does not exist, the temporary one is renamed to it: the folder appears with all
    its files or not at all. If it exists, all files are complete before the first is moved into
    it; other files there stay. JSON, which says what the others mean, goes last. A kill between
    those renames, which take microseconds, leaves new files beside old ones, each whole.

    Raises:
        OSError: the folder cannot be made; names `path`.
    """
    target = Path(path)
    exists = target.exists()
    if exists and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "exists and is not a folder", str(path))
    with naming(path):
        target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target
    try:
        with _temporary(target / _STAGING if exists else target, path, Path.mkdir) as temporary:
            yield temporary
            with naming(path):
                if exists:
                    _move_files(temporary, target)
                else:
                    _flush_entries(temporary)
                    os.rename(temporary, target)
                    _flush_entries(target.parent)
    except OSError as error:
        if error.filename is not None:
            # Nobody knows the temporary folder's name: say what was to be written.
            error.filename = str(error.filename).replace(str(temporary), str(path))
        raise


def write_json(
    path: str | os.PathLike[str], value: Mapping[str, Any], *, follow_link: bool = False
) -> None:
    """Writes `value` as indented JSON, atomically.

    Raises:
        OSError: as of `replacing_file`.
    """
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_text(path, text, follow_link=follow_link)


def write_text(path: str | os.PathLike[str], text: str, *, follow_link: bool = False) -> None:
    """Writes UTF-8, atomically.

    Raises:
        OSError: as of `replacing_file`.
    """
    with replacing_file(path, follow_link=follow_link) as temporary, naming(path):
        temporary.write_text(text, encoding="utf-8")


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors to one safetensors file, atomically.

    Raises:
        OSError: as of `replacing_file`.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    # In a folder of its own: safetensors makes a temporary file beside the one it writes, with
    # a name that tells nobody whose it is after a kill, and with permissions 0600.
    with _temporary(Path(path), path, Path.mkdir) as folder, naming(path):
        file = folder / Path(path).name
        permissions = folder.stat().st_mode & 0o666
        save_file(contiguous, file, metadata={"format": "pt"})
        os.chmod(file, permissions)
        _put_in_place(file, Path(path))
        folder.rmdir()


def write_torch(path: str | os.PathLike[str], value: object) -> None:
    """Writes what `torch.save` takes, atomically.

    Raises:
        OSError: as of `replacing_file`.
    """
    with replacing_file(path) as temporary, naming(path), temporary.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # in which torch wraps what the system said
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else error from None


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Sees that files can be written into `folder`, which exists, by writing one of 4 KB that
    is gone afterwards; after a kill, the next call removes it.

    Raises:
        OSError: none can be written; names `folder`.
    """
    with (
        _temporary(Path(folder) / _STAGING, folder, _make_file) as temporary,
        naming(folder),
    ):
        temporary.write_bytes(b"\0" * 4096)
        temporary.unlink()


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


# ---- temporary files and folders -----------------------------------------------------------


def remove_leavings(path: str | os.PathLike[str]) -> None:
    """Removes the temporary files and folders of processes that were killed as they wrote
    `path`. Those of living ones stay, and so do all where the file system has no locks."""
    target = Path(path)
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{12}}\.tmp")
    with suppress(OSError):
        for name in os.listdir(target.parent):
            if pattern.fullmatch(name):
                _remove_abandoned(target.parent / name)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Removes a folder and what is in it; after a kill it is there whole, or not at all."""
    temporary = _temporary_name(Path(path))
    os.rename(path, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _temporary(
    target: Path, path: str | os.PathLike[str], make: Callable[[Path], object]
) -> Iterator[Path]:
    """Lends what `make` makes beside `target`, held by a lock. If it fails it is removed;
    otherwise the borrower has renamed or removed it. Errors name `path`."""
    remove_leavings(target)
    claim = None
    while claim is None:
        temporary = _temporary_name(target)
        with naming(path):
            make(temporary)
            claim = _locked(temporary)
    try:
        yield temporary
    except BaseException:
        _remove(temporary)
        raise
    finally:
        os.close(claim)


def _temporary_name(target: Path) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp"


def _make_file(path: Path) -> None:
    # Not mkstemp, so that the umask decides its permissions.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock, which ends with the process. None: another process
    has taken `path` for abandoned, as nobody held it yet, and removed it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        return descriptor  # a file system without locks
    os.close(descriptor)
    return None


def _remove_abandoned(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    except OSError:
        pass  # its writer lives
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _put_in_place(temporary: Path, target: Path) -> None:
    """Renames a file that is on the disk. It gets the permissions of the one it replaces."""
    with suppress(FileNotFoundError):
        if not target.is_symlink():
            os.chmod(temporary, target.stat().st_mode & 0o7777)
    _flush(temporary)
    os.replace(temporary, target)
    _flush_entries(target.parent)


def _move_files(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir(), key=lambda file: (file.suffix == ".json", file.name)):
        _put_in_place(file, target / file.name)
    source.rmdir()


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
