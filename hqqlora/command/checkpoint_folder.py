"""A model in a folder of Hugging Face's layout: its files, and the headers of its tensors."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqqlora.command.errors import UsageError, explaining, first_line
from hqqlora.command.safetensors_file import StoredTensor, read_header

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_NOT_COPIED = re.compile(
    r"\..*|config\.json|quantize_config\.json|.*\.index\.json"
    r"|.*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|onnx_data|ot|npz|zip|tar|gz)"
)


@dataclass(frozen=True)
class DenseCheckpoint:
    """A folder in Hugging Face's layout, of which nothing but headers has been read."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    def other_files(self) -> list[Path]:
        """What goes with the weights: tokenizer, generation settings, licence, and the like.

        Raises:
            UsageError: one is a link that leads out of the folder: what it would copy may be
                private, and the result published.
        """
        own = self.folder.resolve()
        if own.parent.name == "snapshots":
            own = own.parent.parent  # a cache of downloads, whose files are in blobs/
        others = []
        for path in sorted(self.folder.iterdir()):
            if not path.is_file() or _NOT_COPIED.fullmatch(path.name):
                continue
            if not path.resolve().is_relative_to(own):
                raise UsageError(f"{path} is a link to {path.resolve()}, outside its folder")
            others.append(path)
        return others

    def fingerprint(self) -> str:
        """A digest of the configuration, the files' sizes and times, and all headers."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted({tensor.file for tensor in self.tensors.values()}):
            state = file.stat()
            digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}".encode())
        for name, tensor in sorted(self.tensors.items()):
            where = f"{name} {tensor.file.name} {tensor.start} {tensor.dtype} {tensor.shape}"
            digest.update(where.encode())
        return digest.hexdigest()


def open_checkpoint(path: str) -> DenseCheckpoint:
    """Reads the headers of the dense model in the folder `path`, or of that name in the local
    cache of downloaded models.

    Raises:
        UsageError: there is none, a file is missing or damaged, or it is quantized already.
    """
    folder = find_folder(path)
    config = _read_json(folder / CONFIG)
    quantized = config.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UsageError(f"{folder} is quantized already ({method}): give the dense model")
    tensors: dict[str, StoredTensor] = {}
    for name in weight_files(folder):
        with explaining(f"cannot read {folder}"):
            found = read_header(folder / name)
        for key, tensor in found.items():
            if key in tensors:
                raise UsageError(f"{key} is in both {tensors[key].file} and {folder / name}")
            tensors[key] = tensor
    if not tensors:
        raise UsageError(f"{folder} holds no tensors")
    checkpoint = DenseCheckpoint(folder, config, tensors)
    checkpoint.other_files()  # so that what is refused is refused now
    return checkpoint


def find_folder(path: str) -> Path:
    """The folder `path`, or the one where the model of that name has been downloaded to.

    Raises:
        UsageError: there is none, or it has no config.json.
    """
    folder = Path(path)
    if not folder.is_dir():
        cached = find_downloaded(path)
        if cached is None:
            what = "is a file, not a folder" if folder.exists() else "there is no such folder"
            raise UsageError(f"{path}: {what}")
        folder = cached
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} has no {CONFIG}: give the folder of a Hugging Face model")
    return folder


def find_downloaded(name: str) -> Path | None:
    """The folder of the model of that name in the local cache of downloads, if it is there."""
    if not _REPOSITORY.fullmatch(name) or importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files of the model in `folder`.

    Raises:
        UsageError: there is none, or one of its index is missing.
    """
    if (folder / INDEX).is_file():
        places = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UsageError(f"{folder / INDEX} has no weight_map")
        names = sorted(set(map(str, places.values())))
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".gguf"))
        found = f" (only {', '.join(others[:3])})" if others else ""
        raise UsageError(
            f"{folder} has neither {SINGLE} nor {INDEX}{found}: save the model with "
            "save_pretrained first"
        )
    # Compared with what there is: the system takes some names amiss, such as long ones.
    present = {path.name for path in folder.iterdir() if path.is_file()}
    for name in names:
        if name not in present:
            raise UsageError(f"{folder} lacks {name[:200]}, which its index names")
    return names


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {os.strerror(error.errno or 0)}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} is not a JSON object")
    return value
