"""Files of instruction data: read, split into a part to train on and a held-out part, and made
rows of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hqqlora.command.errors import UsageError
from hqqlora.training.batches import IGNORED, Examples, Row
from hqqlora.training.chat_data import Instruction, check_messages, encode
from hqqlora.training.records import RECORD_SUFFIXES, hold_out, read_records

_TEXTS = "a prompt and a completion that are text"
_TALKS = "a prompt and a completion that are messages"
_WHOLE = "messages"


@dataclass(frozen=True)
class SplitInstructions:
    """Records to train on and records held out, in a fixed order."""

    source: str
    train: list[Instruction]
    held_out: list[Instruction]


@dataclass(frozen=True)
class TokenRows:
    """Both parts as token ids and labels, a row a record."""

    train: Examples
    held_out: Examples
    cut: int
    """Records that were longer than a sequence."""
    skipped: int
    """Records with nothing to learn in their first tokens; they are in neither part."""
    sample: Instruction
    """The first record held out that is shorter than a sequence, if there is one."""

    @property
    def fingerprint(self) -> str:
        """Of all ids and labels."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(json.dumps(part.sequences).encode())
        return digest.hexdigest()


def holds_instructions(files: Sequence[str], text_field: str) -> bool:
    """Whether the first record of the JSONL files is instruction data, not a text.

    Raises:
        UsageError: it cannot be read.
    """
    for file in files:
        if file.endswith(RECORD_SUFFIXES):
            for _, _, record in read_records(file, text_field):
                return text_field not in record and _format(record) is not None
    return False


def read_instructions(
    files: Sequence[str], text_field: str, held_out: float, seed: int
) -> SplitInstructions:
    """Reads the records of JSONL `files`, all of the first one's format, and holds out whole
    ones, as `records.hold_out` does.

    Raises:
        UsageError: a file cannot be read or is no JSONL file; or a record is of another format.
    """
    found: list[Instruction] = []
    expected = None
    for file in files:
        if not file.endswith(RECORD_SUFFIXES):
            raise UsageError(f"{file} is text, but other files of --data are instruction data")
        for where, _, record in read_records(file, text_field):
            kind = _format(record)
            expected = expected or kind
            if kind is None or kind != expected:
                keys = ", ".join(map(repr, record)) or "none"
                raise UsageError(
                    f"{where}: the first record has {expected}, this one has "
                    f"{kind or 'something else'} (there are: {keys})"
                )
            found.append(_instruction(record, kind, where))
    source = ", ".join(Path(file).name for file in files)
    kept, held = hold_out(source, [record.characters for record in found], held_out, seed)
    return SplitInstructions(source, [found[i] for i in kept], [found[i] for i in held])


def encode_instructions(
    split: SplitInstructions,
    tokenizer: Any,
    length: int,
    eval_tokens: int,
    learn_prompts: bool,
) -> TokenRows:
    """Tokenizes both parts. A record is one row, cut at `length` tokens, and skipped if nothing
    in it is learned then; of the held-out part at most `eval_tokens` tokens are kept, in whole
    rows, but one row always.

    Raises:
        UsageError: a record cannot be tokenized (see `chat_data.encode`), or a part has no row.
    """
    parts: list[list[tuple[Row, Instruction]]] = []
    cut = skipped = 0
    for name, records in (("train on", split.train), ("hold out", split.held_out)):
        found = []
        for record in tqdm(records, desc="tokenizing", leave=False, delay=1):
            ids, labels = encode(record, tokenizer, learn_prompts)
            if all(label == IGNORED for label in labels[1:length]):
                skipped += 1
                continue
            cut += len(ids) > length
            found.append(((ids[:length], labels[:length]), record))
        if not found:
            raise UsageError(
                f"{split.source}: of {len(records)} records to {name} none has anything to "
                f"learn in its first {length} tokens: no assistant's turn, or none that early "
                "(see --sequence-length)"
            )
        parts.append(found)
    train, held = parts
    whole = (record for (ids, _), record in held if len(ids) < length)
    return TokenRows(
        Examples([row for row, _ in train]),
        Examples(_first_tokens([row for row, _ in held], eval_tokens)),
        cut,
        skipped,
        next(whole, held[0][1]),  # a longer one's prompt could be too long for the model
    )


def _first_tokens(rows: list[Row], most: int) -> list[Row]:
    """The first rows that have at most so many tokens together, but one always."""
    total = 0
    for place, (ids, _) in enumerate(rows):
        total += len(ids)
        if total > most:
            return rows[: max(1, place)]
    return rows


def _format(record: dict[str, Any]) -> str | None:
    """What a record holds, in words, if it is instruction data."""
    if "messages" in record:
        return _WHOLE
    if "prompt" not in record or "completion" not in record:
        return None
    return _TEXTS if isinstance(record["prompt"], str) else _TALKS


def _instruction(record: dict[str, Any], kind: str, where: str) -> Instruction:
    if kind == _WHOLE:
        return Instruction(where, check_messages(record["messages"], where))
    prompt, completion = record["prompt"], record["completion"]
    if kind == _TALKS:
        return Instruction(
            where, check_messages(prompt, where), check_messages(completion, where)
        )
    if not isinstance(completion, str):
        kind = type(completion).__name__
        raise UsageError(f"{where}: the prompt is text, but the completion is {kind}")
    return Instruction(where, prompt, completion)
