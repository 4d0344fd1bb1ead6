"""`hqqlora bench generate`, on a tiny random Llama."""

from __future__ import annotations

import json
import statistics

import pytest
import torch

from hqqlora.bench import generate
from hqqlora.cli import main

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("keep_threads")


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """The default model, small; head and embeddings are not tied."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    monkeypatch.setattr(generate, "TINYLLAMA", shape | {"max_position_embeddings": 64})


def bench(*more):
    usual = ["--threads", "1", "--tokens", "4", "--rounds", "2", "--dtype", "float32"]
    return main(["bench", "generate", *usual, *map(str, more)])


def weights(bits_of_a_linear_weight):
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    norms = 64 * (2 * 2 + 1)
    return linear * bits_of_a_linear_weight // 8 + 4 * (96 * 64 + norms)


def test_the_default_model_with_each_contender(tmp_path, capsys):
    pytest.importorskip("hqq")
    names = ["dense", "hqqlora", "hqq"]
    assert bench("--contenders", *names, "--json", tmp_path / "all.json") == 0
    table = capsys.readouterr().out
    result = json.loads((tmp_path / "all.json").read_text())
    rows = table.split("---\n")[1].split("\n\n")[0].splitlines()
    assert [row.split()[0] for row in rows] == names
    assert sorted(result["contenders"]) == sorted(names)
    assert "4 tokens after 16" in table
    assert "14 linear layers" in table
    assert result["model"]["linear_layers"] == 14
    for name, figures in result["contenders"].items():
        times = [times[name] for times in result["rounds"]["token"]]
        base = [times["dense"] for times in result["rounds"]["token"]]
        assert len(times) == 2
        assert figures["token_seconds"]["median"] == statistics.median(times)
        ratios = [a / b for a, b in zip(times, base, strict=True)]
        assert figures["ratio"] == statistics.median(ratios)
        assert figures["first_token_seconds"] > 0
    # 4 bits, and a float32 scale and zero for each 64 weights
    rope = result["contenders"]["dense"]["weight_bytes"] - weights(32)
    assert 0 <= rope <= 128  # (its frequencies are a buffer)
    assert result["contenders"]["hqqlora"]["weight_bytes"] == weights(5) + rope
    assert result["contenders"]["hqq"]["weight_bytes"] == weights(5) + rope


def test_a_model_from_a_folder_that_would_end_at_once(tiny, capsys):
    assert bench("--model", tiny, "--prompt", 3) == 0
    table = capsys.readouterr().out
    assert "4 tokens after 3" in table
    assert tiny.name in table


def test_generation_is_greedy_with_a_cache(monkeypatch):
    dense, _ = generate._dense_model(None, torch.float32)
    ours = generate.make_contender("hqqlora", dense)
    prompt = torch.randint(96, (1, 5))
    lengths = []
    ours.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = generate.generate(ours, prompt, 4)
    assert lengths == [5, 1, 1, 1]
    ids = prompt
    for _ in range(4):
        ids = torch.cat([ids, ours(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found.ids, ids[0, 5:])


def test_layers_that_are_not_ours_are_not_measured(monkeypatch, capsys):
    monkeypatch.setattr(generate, "quantize_with_hqqlora", lambda model, layers: None)
    monkeypatch.setattr(
        generate.hqqlora, "HQQLinear", torch.nn.Linear
    )  # the dense layers are taken for quantized ones
    assert bench() == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "hqqlora: not measured" in error
    assert "instead of {'linear': 15}" in error


BAD = [
    (["--tokens", "1"], "argument --tokens: at least 2 are needed"),
    (["--tokens", "0"], "argument --tokens: 0 is not a positive integer"),
    (["--prompt", "61"], "--prompt and --tokens together exceed the model's 64"),
    (["--contenders", "dense", "dense"], "argument --contenders: each only once"),
    (["--contenders", "llama.cpp"], "argument --contenders: invalid choice"),
    (["--model", "nowhere"], "--model nowhere: there is no such folder or file"),
    (["--json", "nowhere/out.json"], "--json nowhere/out.json: cannot be written"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=lambda value: str(value)[:40])
def test_what_cannot_be_done_is_one_line(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    assert bench(*options) == 2
    shown = capsys.readouterr()
    error = shown.err.strip().splitlines()[-1]
    assert error.startswith("hqqlora bench generate: ")
    assert words in error
    assert shown.out == ""
