"""`hqqlora train` from beginning to end, on a tiny model."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import save_model_and_text

from hqqlora.cli import main

transformers = pytest.importorskip("transformers")

STEPS = 24
BASE = [
    *("--threads", "1", "--sequence-length", "64", "--batch", "4", "--steps", str(STEPS)),
    *("--warmup", "2", "--learning-rate", "1e-2", "--rank", "8", "--sample-tokens", "5"),
]


pytestmark = pytest.mark.usefixtures("keep_threads")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return save_model_and_text(tmp_path_factory.mktemp("train"), lines=400)


@pytest.fixture(scope="module")
def finished(place):
    """A finished run, and what its log says."""
    command = train(place, "finished", "--dtype", "float32")
    assert main(command) == 0
    return place / "finished", json.loads((place / "finished/train_log.json").read_text())


def train(place, output, *more):
    return [
        *("train", "--model", str(place / "model"), "--data", str(place / "text.txt"), *BASE),
        *("--output", str(place / output), *more),
    ]


def test_it_learns(finished):
    _, log = finished
    perplexity = log["perplexity"]
    assert perplexity["fine_tuned"] < 0.1 * perplexity["dense"]
    assert perplexity["dense"] < perplexity["quantized"] * 1.5
    losses = [step["loss"] for step in log["steps"]]
    assert len(losses) == STEPS
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])


def test_the_log_says_what_was_done(finished):
    folder, log = finished
    names = ["adapter", "importance.safetensors", "loss.png", "train_log.json"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert log["options"]["rank"] == 8
    assert log["options"]["bits"] == 4
    assert log["machine"]["versions"]["torch"] == torch.__version__
    assert log["machine"]["threads"] == 1
    assert log["training"]["tokens_per_second"] > 0
    assert log["linear_layers"]["count"] == 14
    assert log["linear_layers"]["bits_per_weight"] == 4 + 2 * 32 / 64  # float32 scale and zero
    assert log["linear_layers"]["dense_bits_per_weight"] == 32
    assert 1e8 < log["memory"]["training"] < 1e10
    assert set(log["sample"]) == {"prompt", "before", "after"}
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_dense_perplexity_is_transformers_own(finished, place):
    _, log = finished
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    content = (place / "text.txt").read_text()
    held = content[content.rfind("\n", 0, round(0.9 * len(content))) + 1 :]
    ids = torch.tensor([*tokenizer(held).input_ids, tokenizer.eos_token_id])
    ids = ids[: len(ids) // 64 * 64].view(-1, 64)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert log["perplexity"]["tokens"] == ids[:, 1:].numel()
    assert log["perplexity"]["dense"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_the_adapter_gives_the_fine_tuned_perplexity(finished, place):
    import hqqlora
    from hqqlora.training.next_token_loss import NextTokenLoss

    folder, log = finished
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model").eval()
    importance = load_file(folder / "importance.safetensors")
    config = hqqlora.BaseQuantizeConfig()
    hqqlora.quantize_model(model, config, importance=importance, progress=False)
    hqqlora.load_adapter(model, folder / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    content = (place / "text.txt").read_text()
    held = content[content.rfind("\n", 0, round(0.9 * len(content))) + 1 :]
    ids = torch.tensor([*tokenizer(held).input_ids, tokenizer.eos_token_id])
    ids = ids[: len(ids) // 64 * 64].view(-1, 64)
    loss = NextTokenLoss(model.eval()).sum(ids) / ids[:, 1:].numel()
    assert log["perplexity"]["fine_tuned"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_a_finished_run_is_not_overwritten(finished, place, capsys):
    folder, _ = finished
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert main(train(place, "finished")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--overwrite" in error
    assert main(["train", "--resume", "--output", str(folder)]) == 0
    assert "held-out perplexity" in capsys.readouterr().out
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_table(finished, capsys):
    folder, log = finished
    main(["train", "--resume", "--output", str(folder)])
    table = capsys.readouterr().out
    for word in ("bits per weight", "linear layers", "tokens/s", "peak memory"):
        assert word in table
    for value in log["perplexity"].values():
        assert (f"{value:,}" if isinstance(value, int) else f"{value:.2f}") in table


@pytest.mark.parametrize(
    "more",
    [
        ["--gradient-checkpointing", "--dtype", "float32"],
        ["--micro-batch", "3", "--dtype", "float32"],
        ["--bits", "3", "--axis", "0", "--rslora", "--schedule", "cosine"],
        ["--bits", "8", "--group-size", "none", "--target-modules", "q_proj", "v_proj"],
        ["--bits", "2", "--group-size", "16", "--target-modules", r".*\.mlp\..*"],
        ["--no-importance"],
    ],
    ids=lambda more: " ".join(more[:2]),
)
def test_other_options(place, finished, capsys, more):
    output = "other" + "".join(more[:2])
    assert main(train(place, output, *more, "--sample-tokens", "0", "--prompt", "x")) == 0
    log = json.loads((place / output / "train_log.json").read_text())
    assert log["perplexity"]["fine_tuned"] < 0.5 * log["perplexity"]["quantized"]
    if "--no-importance" in more:  # other scales and zeros
        assert not (place / output / "importance.safetensors").exists()
        assert log["perplexity"]["quantized"] != finished[1]["perplexity"]["quantized"]
    if more[0] in ("--gradient-checkpointing", "--micro-batch"):  # memory, not results
        expected = [step["loss"] for step in finished[1]["steps"]]
        assert [step["loss"] for step in log["steps"]] == pytest.approx(expected, rel=1e-5)
    config = json.loads((place / output / "adapter/adapter_config.json").read_text())
    names = config["target_modules"]
    if "q_proj" in more:
        assert len([n for n in names if n.endswith(("q_proj", "v_proj"))]) == len(names)


def test_epochs_count_sequences(place, capsys):
    steps = BASE.index("--steps")
    command = [word for word in train(place, "epochs") if word not in BASE[steps : steps + 2]]
    assert main([*command, "--epochs", "1.5", "--sample-tokens", "0"]) == 0
    log = json.loads((place / "epochs/train_log.json").read_text())
    sequences = log["data"]["train_tokens"] // 64
    assert log["training"]["steps"] == math.ceil(1.5 * sequences / 4)
    assert log["options"]["steps"] == log["training"]["steps"]


def test_the_best_adapter_is_kept(place, capsys):
    """A rate at which it first learns and then is thrown back."""
    from hqqlora.training import loop

    folder = place / "best"
    more = ["--dtype", "float32", "--sample-tokens", "0", "--steps", "6", "--warmup", "0"]
    rates = {5: 30.0, 6: 30.0}
    with pytest.MonkeyPatch.context() as patch:
        rate = loop.learning_rate
        patch.setattr(loop, "learning_rate", lambda s, o: rates.get(s + 1, rate(s, o)))
        assert main(train(place, "best", *more, "--eval-every", "2")) == 0
    log = json.loads((folder / "train_log.json").read_text())
    measured = {entry["step"]: entry["loss"] for entry in log["held_out_losses"]}
    assert list(measured) == [2, 4]
    assert measured[4] < measured[2] < log["held_out_loss"]["fine_tuned"]
    said = capsys.readouterr().out
    assert f"lowest after step 4: {math.exp(measured[4]):.2f}" in said
    best = load_file(folder / "adapter-best/adapter_model.safetensors")
    last = load_file(folder / "adapter/adapter_model.safetensors")
    assert best.keys() == last.keys()
    assert any(not torch.equal(best[name], last[name]) for name in best)

    assert main(train(place, "short", *more, "--steps", "4")) == 0
    alone = json.loads((place / "short/train_log.json").read_text())
    assert alone["steps"][0]["loss"] == log["steps"][0]["loss"]  # measuring changes nothing

    assert main(train(place, "best", *more, "--eval-every", "4", "--overwrite")) == 0
    assert not (folder / "adapter-best").exists()  # the last one is the best


def test_default_folders_are_numbered(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = train(place, "x", "--steps", "1", "--sample-tokens", "0")
    command = [word for word in command if word not in ("--output", str(place / "x"))]
    assert main(command) == 0
    assert main(command) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hqqlora-run", "hqqlora-run-2"]
    capsys.readouterr()
    assert main(["train", "--resume"]) == 0
    assert capsys.readouterr().out.startswith("hqqlora-run-2 is finished already")


def test_without_matplotlib_there_is_a_note(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(train(place, "no-plot", "--steps", "1", "--sample-tokens", "0")) == 0
    assert "pip install 'hqqlora[plot]'" in capsys.readouterr().err
    names = sorted(p.name for p in (place / "no-plot").iterdir())
    assert names == ["adapter", "importance.safetensors", "train_log.json"]


def test_help_names_every_option_and_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for words in ("--bits", "(default: 4)", "--resume", "--learning-rate", "--dropout P"):
        assert words in text


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "hqqlora", "train", "--model", "/no/model"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]  # one before it says so if other programs are busy
    assert last == "hqqlora train: --model /no/model: there is no such folder or file"
