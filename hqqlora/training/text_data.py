"""The text: read, split into a part to train on and a held-out part, and cut into windows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqqlora.command.errors import UsageError
from hqqlora.training.records import RECORD_SUFFIXES, hold_out, read_file, read_records


@dataclass(frozen=True)
class SplitText:
    """Documents to train on and documents held out, in a fixed order."""

    source: str
    train: list[str]
    held_out: list[str]
    held_out_names: list[str]


@dataclass(frozen=True)
class TokenWindows:
    """Both parts as windows [count, sequence_length] of token ids, int64."""

    train: Tensor
    held_out: Tensor
    fingerprint: str

    @property
    def highest(self) -> int:
        """The highest token."""
        return int(max(self.train.max(), self.held_out.max()))


def read_text(files: Sequence[str], text_field: str, held_out: float, seed: int) -> SplitText:
    """Reads and splits the text of `files`, or the Python language reference without any.

    Records of JSONL files, and the reference's topics, are held out whole: they are shuffled by
    `seed`, and taken until they hold the fraction `held_out` of the characters. A text file is
    one document, of which the last part is held out, cut at a line's end where there is one.

    Raises:
        UsageError: a file cannot be read, or is empty; or nothing is left to train on.
    """
    if not files:
        names, documents = _python_reference()
        return _hold_out_documents(
            "Python language reference", names, documents, held_out, seed
        )
    records: list[str] = []
    record_names: list[str] = []
    train: list[str] = []
    held: list[str] = []
    held_names: list[str] = []
    for file in files:
        if file.endswith(RECORD_SUFFIXES):
            for line_number, text in _read_texts(file, text_field):
                records.append(text)
                record_names.append(f"{file}:{line_number}")
        else:
            head, tail = _hold_out_end(read_file(file), held_out)
            train.append(head)
            held.append(tail)
            held_names.append(f"{file}: last {len(tail)} characters")
    source = ", ".join(Path(file).name for file in files)
    if records:
        split = _hold_out_documents(source, record_names, records, held_out, seed)
        train += split.train
        held += split.held_out
        held_names += split.held_out_names
    return SplitText(source, train, held, held_names)


def cut_windows(text: SplitText, tokenizer: Any, length: int, eval_tokens: int) -> TokenWindows:
    """Tokenizes both parts and cuts each into windows of `length` tokens.

    Documents are joined with the end-of-sequence token and the rest that fills no window is
    left away; of the held-out part at most `eval_tokens` tokens are kept, but one window
    always. If the tokenizer begins every text with a token, so does every window.

    Raises:
        UsageError: a part is shorter than one window.
    """
    start = list(tokenizer("").input_ids)
    if start and start[-1] == tokenizer.eos_token_id:
        start.pop()
    body = length - len(start)
    if body < 2:
        raise UsageError(f"--sequence-length {length} leaves no room for text")
    parts = []
    for name, documents in (("train on", text.train), ("hold out", text.held_out)):
        tokens = _join(documents, tokenizer)
        windows = len(tokens) // body
        if windows == 0:
            raise UsageError(
                f"the text to {name} has {len(tokens)} tokens, fewer than one sequence of "
                f"{length}: give more text, or a smaller --sequence-length"
            )
        part = torch.tensor(tokens[: windows * body], dtype=torch.int64).view(windows, body)
        prefix = torch.tensor(start, dtype=torch.int64).expand(windows, len(start))
        parts.append(torch.cat([prefix, part], dim=1))
    train, held_out = parts
    held_out = held_out[: max(1, eval_tokens // length)].contiguous()
    digest = hashlib.sha256()
    for part in (train, held_out):
        digest.update(part.numpy().tobytes())
    return TokenWindows(train, held_out, digest.hexdigest())


def check_fit(model: nn.Module, highest: int, sequence_length: int) -> None:
    """Checks that a model can read sequences of this length, and tokens up to `highest`.

    Raises:
        UsageError: a sequence is too long for it, or a token is not of its vocabulary.
    """
    dense: Any = model
    longest = getattr(dense.config, "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise UsageError(f"--sequence-length {sequence_length} exceeds the model's {longest}")
    known = len(dense.get_input_embeddings().weight)
    if highest >= known:
        raise UsageError(
            f"the tokenizer gives token {highest}, but the model knows {known}: do they "
            "belong together?"
        )


def _join(documents: Sequence[str], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    tokens: list[int] = []
    for document in documents:
        tokens += tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        if end is not None:
            tokens.append(end)
    return tokens


def _python_reference() -> tuple[list[str], list[str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UsageError(
            "this Python comes without pydoc_data, the default text: give --data"
        ) from None
    names = sorted(topics)
    return names, [topics[name] for name in names]


def _hold_out_documents(
    source: str, names: list[str], documents: list[str], fraction: float, seed: int
) -> SplitText:
    kept, held = hold_out(source, [len(text) for text in documents], fraction, seed)
    return SplitText(
        source,
        [documents[i] for i in kept],
        [documents[i] for i in held],
        [names[i] for i in held],
    )


def _hold_out_end(text: str, fraction: float) -> tuple[str, str]:
    cut = round(len(text) * (1 - fraction))
    line_end = text.rfind("\n", cut // 2, cut)
    cut = cut if line_end < 0 else line_end + 1
    return text[:cut], text[cut:]


def _read_texts(file: str, field: str) -> list[tuple[int, str]]:
    """The non-empty texts of a JSONL file, with their line numbers."""
    texts = []
    for where, number, record in read_records(file, field):
        if field not in record:
            keys = ", ".join(map(repr, record)) or "none"
            raise UsageError(
                f"{where}: no field {field!r} (there are: {keys}); see --data and --text-field"
            )
        if not isinstance(record[field], str):
            kind = type(record[field]).__name__
            raise UsageError(f"{where}: {field!r} is not text but {kind}")
        if record[field].strip():
            texts.append((number, record[field]))
    if not texts:
        raise UsageError(f"{file} has no text in the field {field!r}")
    return texts
