"""Files of instruction data: which format they have, what is held out, cut and skipped."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hqqlora.command.errors import UsageError
from hqqlora.training.batches import IGNORED, Examples
from hqqlora.training.chat_data import Instruction
from hqqlora.training.instructions import (
    SplitInstructions,
    encode_instructions,
    holds_instructions,
    read_instructions,
)
from hqqlora.training.options import TrainOptions
from hqqlora.training.training_data import read_data, tokenize

TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
TEXTS = {"prompt": "a", "completion": "b"}
TALKS = {"prompt": TALK["messages"][:1], "completion": TALK["messages"][1:]}
TEXT = {"text": "a"}


class CharacterTokenizer:
    """One token a character, 0 at the end."""

    eos_token = "\0"

    def __call__(self, text: str, verbose: bool = True) -> Any:
        return SimpleNamespace(input_ids=[ord(c) for c in text])


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_the_first_records_keys_say_the_format(tmp_path: Path) -> None:
    for records, expected in (
        ([TALK, TEXT], True),
        ([TEXTS], True),
        ([{**TALKS, "id": 1}], True),
        ([TEXT, TALK], False),
        ([{**TALK, **TEXT}], False),  # as ever: what has a text is text
        ([{"prompt": "a"}], False),
    ):
        file = write(tmp_path / "a.jsonl", *records)
        assert holds_instructions([file], "text") is expected
    assert holds_instructions([write(tmp_path / "a.txt", TALK)], "text") is False
    assert holds_instructions([write(tmp_path / "a.jsonl", TALK)], "messages") is False


@pytest.mark.parametrize("other", [TALK, TEXTS, TALKS, TEXT])
@pytest.mark.parametrize("first", [TALK, TEXTS, TALKS])
def test_a_record_of_another_format_is_refused(tmp_path: Path, first: Any, other: Any) -> None:
    files = [write(tmp_path / "a.jsonl", first, first), write(tmp_path / "b.jsonl", other)]
    if first == other:
        assert len(read_instructions(files, "text", 0.3, 0).train) == 2
        return
    with pytest.raises(UsageError, match=r"b.jsonl, line 1: the first record has "):
        read_instructions(files, "text", 0.3, 0)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [{"role": "user"}]}, "message 1 has other keys"),
        ({"prompt": "a", "completion": 5}, "prompt is text, but the completion is int"),
        ({"prompt": "a", "completion": TALKS["completion"]}, "the completion is list"),
        ({"prompt": TALKS["prompt"], "completion": "b"}, "no list"),
    ],
)
def test_a_malformed_record_is_refused(tmp_path: Path, record: Any, reason: str) -> None:
    file = write(tmp_path / "a.jsonl", record)
    with pytest.raises(UsageError, match=f"a.jsonl, line 1: .*{reason}"):
        read_instructions([file], "text", 0.3, 0)


def test_text_files_do_not_mix_with_instructions(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    files = [str(tmp_path / "a.txt"), write(tmp_path / "b.jsonl", TALK)]
    with pytest.raises(UsageError, match=r"a\.txt is text, but other files"):
        read_data(TrainOptions(data=tuple(files)))
    with pytest.raises(UsageError, match="--learn-prompts: the data is text"):
        read_data(TrainOptions(data=(files[0],), learn_prompts=True))


def test_whole_records_are_held_out_by_the_seed(tmp_path: Path) -> None:
    records = [{"prompt": f"{i}: ", "completion": "x" * i} for i in range(40)]
    file = write(tmp_path / "a.jsonl", *records)
    split = read_instructions([file], "text", 0.2, 3)
    both = split.train + split.held_out
    assert sorted(len(record.completion or "") for record in both) == list(range(40))
    sizes = [sum(record.characters for record in part) for part in (split.held_out, both)]
    assert 0.2 * sizes[1] <= sizes[0] < 0.2 * sizes[1] + 44
    assert split == read_instructions([file], "text", 0.2, 3)
    assert split.held_out != read_instructions([file], "text", 0.2, 4).held_out


def split(train: list[tuple[str, str]], held: list[tuple[str, str]]) -> SplitInstructions:
    parts = [[Instruction(f"f:{p}", p, c) for p, c in part] for part in (train, held)]
    return SplitInstructions("f", *parts)


def test_records_are_cut_and_those_with_nothing_to_learn_skipped() -> None:
    data = split(
        [("aa", "bbb"), ("aaaa", "b"), ("a", "b")], [("aaaaaaa", "b"), ("a", "bbbbbbb")]
    )
    rows = encode_instructions(data, CharacterTokenizer(), 4, 1000, False)
    assert rows.train.sequences == [
        ([97, 97, 98, 98], [IGNORED, IGNORED, 98, 98]),
        ([97, 98, 0], [IGNORED, 98, 0]),
    ]
    assert rows.held_out.sequences == [([97, 98, 98, 98], [IGNORED, 98, 98, 98])]
    assert (rows.cut, rows.skipped) == (2, 2)
    assert rows.sample.prompt == "a"
    assert (rows.train.tokens, rows.train.predictions, rows.train.highest) == (7, 4, 98)

    everything = encode_instructions(data, CharacterTokenizer(), 4, 1000, True)
    assert (everything.cut, everything.skipped) == (4, 0)
    assert everything.train.predictions == 3 + 3 + 2
    longer = split([("a", "b")], [("aaaaaaa", "b"), ("a", "b")])
    assert encode_instructions(longer, CharacterTokenizer(), 4, 1, True).sample.prompt == "a"
    assert everything.fingerprint != rows.fingerprint


def test_a_part_without_anything_to_learn_is_refused() -> None:
    data = split([("a", "b")], [("aaaa", "b"), ("aaaaaaa", "b")])
    with pytest.raises(UsageError, match="of 2 records to hold out none has anything to learn"):
        encode_instructions(data, CharacterTokenizer(), 4, 1000, False)


@pytest.mark.parametrize(("eval_tokens", "kept"), [(1, 1), (5, 1), (6, 2), (8, 2), (1000, 3)])
def test_no_more_is_evaluated_than_asked_for(eval_tokens: int, kept: int) -> None:
    data = split([("a", "b")], [("a", "b")] * 3)
    rows = encode_instructions(data, CharacterTokenizer(), 4, eval_tokens, False)
    assert len(rows.held_out) == kept


def test_a_steps_tokens_are_those_that_are_no_padding() -> None:
    rows = Examples([([1] * n, [1] * n) for n in range(2, 9)])
    seen: list[int] = []
    for step in range(7):
        batch = rows.batch(step, 3, seed=5)
        assert batch.mask is not None
        lengths = batch.mask.sum(1).tolist()
        assert rows.batch_tokens(step, 3, seed=5) == sum(lengths) == batch.tokens
        assert batch.ids.shape == (3, max(lengths))
        seen += lengths
    assert all(sorted(seen[i : i + 7]) == list(range(2, 9)) for i in (0, 7, 14))


def test_the_summary_says_what_was_left_out(tmp_path: Path) -> None:
    records = [{"prompt": "a", "completion": "b" * n} for n in (1, 1, 9)] * 2
    file = write(tmp_path / "a.jsonl", *records, {"prompt": "a" * 9, "completion": "b"})
    options = TrainOptions(data=(file,), sequence_length=5, held_out=0.1, prompt="mine")
    data = tokenize(read_data(options), CharacterTokenizer(), options)
    facts = data.facts
    assert facts["train_records"] + facts["held_out_records"] + facts["skipped_records"] == 7
    assert facts["cut_records"] == 2
    assert "2 of them cut at 5 tokens" in data.summary
    assert "1 skipped: nothing to learn in their first 5 tokens" in data.summary
    assert data.prompt.text == "mine"
