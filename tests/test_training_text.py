"""What is held out, and how text becomes windows of tokens."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from hqqlora.training.batches import Examples
from hqqlora.training.text_data import SplitText, cut_windows, read_text


class CharacterTokenizer:
    """One token a character; `start` begins every text, as some real tokenizers do."""

    eos_token_id = 0

    def __init__(self, start=()):
        self.start = list(start)

    def __call__(self, text, add_special_tokens=True, verbose=True):
        tokens = [ord(c) for c in text]
        return SimpleNamespace(input_ids=(self.start if add_special_tokens else []) + tokens)


def test_the_default_text_holds_out_whole_topics():
    from pydoc_data.topics import topics

    split = read_text((), "text", 0.1, seed=0)
    assert sorted(split.train + split.held_out) == sorted(topics.values())
    assert [topics[name] for name in split.held_out_names] == split.held_out
    total = sum(map(len, topics.values()))
    held = sum(map(len, split.held_out))
    assert 0.1 * total <= held < 0.1 * total + len(split.held_out[-1])
    assert split == read_text((), "text", 0.1, seed=0)
    assert split.held_out_names != read_text((), "text", 0.1, seed=1).held_out_names


def test_records_are_held_out_whole(tmp_path):
    texts = [f"record {i} " + "x" * i for i in range(50)]
    file = tmp_path / "records.jsonl"
    lines = [json.dumps({"body": text, "id": i}) for i, text in enumerate(texts)]
    file.write_text("\n".join([*lines, "", json.dumps({"body": "  "})]))
    split = read_text((str(file),), "body", 0.2, seed=3)
    assert sorted(split.train + split.held_out) == sorted(texts)
    assert sum(map(len, split.held_out)) >= 0.2 * sum(map(len, texts))
    numbers = [int(name.rsplit(":", 1)[1]) for name in split.held_out_names]
    assert [texts[number - 1] for number in numbers] == split.held_out


def test_one_long_record_does_not_take_all(tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text('{"text": "' + "a" * 1000 + '"}\n{"text": "b"}\n')
    for seed in range(4):
        split = read_text((str(file),), "text", 0.9, seed)
        assert len(split.train) == len(split.held_out) == 1


def test_the_end_of_a_text_file_is_held_out(tmp_path):
    file = tmp_path / "book.txt"
    content = "".join(f"line {i}\n" for i in range(100))
    file.write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    split = read_text((str(file),), "text", 0.25, seed=0)
    assert split.train[0] + split.held_out[0] == content
    assert split.held_out[0].startswith("line ")
    assert len(split.held_out[0]) == pytest.approx(0.25 * len(content), abs=8)


def test_text_and_records_together(tmp_path):
    (tmp_path / "a.txt").write_text("alpha\n" * 10)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    split = read_text((str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")), "text", 0.3, 0)
    assert len(split.train) == len(split.held_out) == len(split.held_out_names) == 2


def test_windows_hold_the_documents_in_order():
    text = SplitText("", ["abc", "defg"], ["hijklmnop"], [])
    windows = cut_windows(text, CharacterTokenizer(), 4, eval_tokens=1000)
    assert windows.train.tolist() == [[97, 98, 99, 0], [100, 101, 102, 103]]
    assert windows.held_out.tolist() == [[104, 105, 106, 107], [108, 109, 110, 111]]
    text = SplitText("", ["abd", "defg"], ["hijklmnop"], [])
    other = cut_windows(text, CharacterTokenizer(), 4, eval_tokens=1000)
    assert other.fingerprint != windows.fingerprint


def test_every_window_begins_as_the_tokenizer_begins_a_text():
    text = SplitText("", ["abcdef"], ["ghijkl"], [])
    windows = cut_windows(text, CharacterTokenizer(start=[7]), 4, eval_tokens=1000)
    assert windows.train.tolist() == [[7, 97, 98, 99], [7, 100, 101, 102]]


@pytest.mark.parametrize(("eval_tokens", "kept"), [(1, 1), (8, 2), (11, 2), (1000, 5)])
def test_no_more_is_evaluated_than_asked_for(eval_tokens, kept):
    text = SplitText("", ["a" * 20], ["b" * 20], [])
    windows = cut_windows(text, CharacterTokenizer(), 4, eval_tokens)
    assert windows.held_out.shape == (kept, 4)


def test_every_epoch_sees_every_window_once():
    windows = Examples(torch.arange(7)[:, None])
    seen = torch.cat([windows.batch(step, 3, seed=5).ids for step in range(14)])
    epochs = seen.flatten().view(6, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1
    again = windows.batch(9, 3, seed=5).ids  # without the steps before it
    assert torch.equal(again.flatten(), seen.flatten()[27:30])
    other = torch.cat([windows.batch(step, 3, seed=6).ids for step in range(14)])
    assert not torch.equal(other, seen)
