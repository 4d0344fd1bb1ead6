"""`hqqlora train --as-stored` on a GGUF file's own codes, and the adapter for llama.cpp."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import patterned_text, save_tiny_llama

import hqqlora
from hqqlora.cli import main
from hqqlora.training.next_token_loss import NextTokenLoss

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from gguf_files import write_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("keep_threads")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_model(folder / "model.gguf", "Q4_1")
    write_model(folder / "dense.gguf", "F16")
    save_tiny_llama(folder / "folder")
    (folder / "text.txt").write_text(patterned_text(200))
    return folder


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    assert main(train(place, "model.gguf", "--as-stored")) == 0
    return place / "run"


def train(place: Path, model: str, *more: str) -> list[str]:
    return [
        *("train", "--model", str(place / model), "--data", str(place / "text.txt")),
        *("--threads", "1", "--sequence-length", "64", "--batch", "4", "--steps", "12"),
        *("--warmup", "2", "--learning-rate", "1e-2", "--rank", "8", "--sample-tokens", "0"),
        *("--dtype", "float32", "--output", str(place / "run"), *more),
    ]


def test_the_perplexities_are_those_of_the_files_codes(place: Path, finished: Path):
    log = json.loads((finished / "train_log.json").read_text())
    assert set(log["perplexity"]) == {"tokens", "quantized", "fine_tuned"}
    assert log["linear_layers"]["bits_per_weight"] == 4 + 2 * 32 / 32
    model: Any = hqqlora.load_gguf(place / "model.gguf", progress=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file="model.gguf")
    content = (place / "text.txt").read_text()
    held = content[content.rfind("\n", 0, round(0.9 * len(content))) + 1 :]
    ids = torch.tensor([*tokenizer(held).input_ids, tokenizer.eos_token_id])
    ids = ids[: len(ids) // 64 * 64].view(-1, 64)
    for which in ("quantized", "fine_tuned"):
        if which == "fine_tuned":
            hqqlora.load_adapter(model, finished / "adapter")
        loss = NextTokenLoss(model.eval()).sum(ids) / ids[:, 1:].numel()
        assert log["perplexity"][which] == pytest.approx(math.exp(loss), rel=1e-4)


def test_the_adapter_for_llama_cpp(place: Path, finished: Path, tmp_path: Path, capsys: Any):
    """Its base is found, and the file is what `export_gguf_adapter` writes."""
    found, expected = tmp_path / "found.gguf", tmp_path / "expected.gguf"
    assert main(["export", "gguf-adapter", str(finished / "adapter"), str(found)]) == 0
    assert f"written: {found}, " in capsys.readouterr().out
    model = hqqlora.load_gguf(place / "model.gguf", progress=False)
    hqqlora.export_gguf_adapter(finished / "adapter", expected, model)
    assert found.read_bytes() == expected.read_bytes()
    more = ["--base", str(place / "dense.gguf"), "--type", "F16"]
    assert main(["export", "gguf-adapter", str(finished / "adapter"), str(found), *more]) == 0
    assert found.stat().st_size < 0.6 * expected.stat().st_size


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("folder", ["--as-stored"], "--as-stored: {}/folder is no .gguf file"),
        ("model.gguf", ["--as-stored", "--bits", "4"], "--bits: {}/model.gguf is quantized"),
        ("dense.gguf", ["--as-stored"], "{}/dense.gguf has no linear layer in a format that"),
    ],
)
def test_what_cannot_be_trained_so(
    place: Path, tmp_path: Path, capsys: Any, model: str, options: list[str], words: str
):
    command = train(place, model, *options, "--output", str(tmp_path / "run"))
    assert main(command) == 2
    assert words.format(place) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_has_no_place_in_a_file_for_llama_cpp(
    place: Path, finished: Path, tmp_path: Path, capsys: Any
):
    for arguments, code, words in [
        ([place / "folder", "out.gguf"], 2, "is no adapter: it has no adapter_config.json"),
        ([finished / "adapter", "out.gguf", "--base", place / "text.txt"], 2, "--base "),
        ([finished / "adapter", "no/out.gguf"], 1, "cannot write: No such file or directory: "),
    ]:
        arguments[1] = tmp_path / arguments[1]
        assert main(["export", "gguf-adapter", *map(str, arguments)]) == code
        error = capsys.readouterr().err
        assert error.startswith("hqqlora export gguf-adapter: ")
        assert words in error
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
