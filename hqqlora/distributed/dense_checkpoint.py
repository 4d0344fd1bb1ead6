"""The tensors of a Hugging Face checkpoint, read whole or in part, one at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class DenseCheckpoint:
    """A folder with model.safetensors, or with several files and their index.

    Nothing is kept open or in memory between two reads.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Reads the index.

        Raises:
            FileNotFoundError: neither file is there.
            ValueError: the index is damaged; names it.
        """
        self.folder = Path(folder)
        self._files = _index(self.folder)

    def __contains__(self, key: object) -> bool:
        """Whether there is a tensor of this name."""
        return key in self._files

    def keys(self) -> Iterable[str]:
        """The names of the tensors."""
        return self._files.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of one tensor, from the file's header."""
        return tuple(self._open(key, lambda file: file.get_slice(key).get_shape()))

    def tensor(self, key: str) -> Tensor:
        """One tensor, on the CPU."""
        tensor: Tensor = self._open(key, lambda file: file.get_tensor(key))
        return tensor

    def part(self, key: str, dim: int, start: int, stop: int) -> Tensor:
        """The indices start to stop of dimension 0 or 1 of one tensor, on the CPU."""
        where = (slice(None),) * dim + (slice(start, stop),)

        def read(file: Any) -> Tensor:
            part: Tensor = file.get_slice(key)[where]
            return part

        return self._open(key, read)  # type: ignore[no-any-return]

    def _open(self, key: str, read: Any) -> Any:
        path = self.folder / self._files[key]
        try:
            with safe_open(path, framework="pt") as file:
                return read(file)
        except SafetensorError as error:
            raise ValueError(f"{path}: {key} cannot be read: {error}") from error


def _index(folder: Path) -> dict[str, str]:
    """Key -> file name."""
    if (folder / INDEX).exists():
        try:
            files = json.loads((folder / INDEX).read_text())["weight_map"]
            places = {str(key): str(name) for key, name in files.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{folder / INDEX} is damaged: {error!r}") from error
        for name in set(places.values()):
            if Path(name).name != name or name == "..":
                raise ValueError(f"{folder / INDEX} names {name!r}, which is not in its folder")
        return places
    if not (folder / SINGLE).exists():
        raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}")
    try:
        with safe_open(folder / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)
    except SafetensorError as error:
        raise ValueError(f"{folder / SINGLE} is damaged: {error}") from error
