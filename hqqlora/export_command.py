"""`hqqlora export gguf`: a quantized checkpoint folder as one GGUF file."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from hqqlora.command.checkpoint_folder import CONFIG
from hqqlora.command.errors import UsageError, explaining, first_line, writing
from hqqlora.command.model_source import LOCAL
from hqqlora.command.packages import require
from hqqlora.hqq_checkpoint import WEIGHTS_FILE


@dataclass(frozen=True)
class ExportOptions:
    """What to write where; see `hqqlora.export_gguf`."""

    folder: Path
    output: Path
    tokenizer: Path | None
    dense_type: str | None
    requantize: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option to `parser`."""
    parser.add_argument(
        "folder",
        type=Path,
        metavar="MODEL_FOLDER",
        help="a model quantized by HQQ, as save_pretrained (or hqq's save_quantized) writes it",
    )
    parser.add_argument(
        "output", type=Path, metavar="OUT.gguf", help="the file to write, replaced if it exists"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="folder of a tokenizer, or a GGUF file of the same model to copy it from "
        "(default: MODEL_FOLDER's)",
    )
    parser.add_argument(
        "--dense-type",
        choices=("F32", "F16", "BF16", "Q8_0"),
        help="of embeddings and layers that are not quantized (default: BF16 for bfloat16, F16 "
        "for others)",
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="round to Q8_0 the layers that no block of GGUF's holds as they are (axis 0, "
        "groups of 16, ...), instead of stopping",
    )


def from_namespace(namespace: argparse.Namespace) -> ExportOptions:
    """The options of a parsed command line."""
    return ExportOptions(
        namespace.folder,
        namespace.output,
        namespace.tokenizer,
        namespace.dense_type,
        namespace.requantize,
    )


def run(options: ExportOptions) -> None:
    """Reads the checkpoint and writes the file.

    Raises:
        UsageError: a package is missing, the folder is no quantized checkpoint, or something
            in it has no place in GGUF. Nothing is written.
        RunError: the file cannot be written.
    """
    require("transformers", "accelerate", "gguf")
    _check_quantized(options.folder)
    from hqqlora.gguf import export_gguf

    with _warnings_as_lines():
        with explaining(f"cannot load {options.folder}"):
            model = _load_model(options.folder)
        tokenizer = _tokenizer(options.tokenizer or options.folder)
        with explaining(f"cannot export {options.folder}"), writing(options.output):
            export_gguf(
                model,
                options.output,
                tokenizer,
                dense_type=options.dense_type,
                requantize=options.requantize,
            )
    print(f"written: {options.output}, {options.output.stat().st_size / 1e6:,.1f} MB")


def _check_quantized(folder: Path) -> None:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        method = config.get("quantization_config", {}).get("quant_method")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise UsageError(
            f"{path} is not a model's configuration: {first_line(error)}"
        ) from None
    if method != "hqq" and not (folder / WEIGHTS_FILE).is_file():
        found = "is dense" if method is None else f"is quantized by {method!r}"
        raise UsageError(f"{folder} {found}: give a model that was quantized by HQQ")


def _load_model(folder: Path) -> Any:
    import transformers

    import hqqlora.transformers  # teaches it to read the layers

    _ = hqqlora.transformers
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if (folder / WEIGHTS_FILE).is_file():
        return hqqlora.AutoHQQHFModel.from_quantized(str(folder))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **LOCAL)


def _tokenizer(path: Path) -> Any:
    """A tokenizer of transformers', or the path of a GGUF file."""
    if path.is_file():
        return path
    from transformers import AutoTokenizer

    with explaining(f"cannot load the tokenizer of {path} (see --tokenizer)"):
        return AutoTokenizer.from_pretrained(path, **LOCAL)


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Shows what hqqlora warns of, such as weights that were rounded, as the command line shows
    things: without the place in the code."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        print(f"hqqlora export gguf: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that other packages have changed
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield
