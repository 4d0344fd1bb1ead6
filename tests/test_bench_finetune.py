"""`hqqlora bench finetune`: the same step on this library, on hqq and on dense weights."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import statistics

import pytest
import torch
from tiny_llama import save_model_and_text, save_tiny_llama

from hqqlora.bench import contenders as of_contenders
from hqqlora.bench.contenders import CONTENDERS, Contender
from hqqlora.bench.memory import can_measure, measure_memory
from hqqlora.bench.options import BenchOptions
from hqqlora.bench.rounds import take_turns
from hqqlora.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

ROUNDS, STEPS = 2, 2
NAMES = [name for name, who in CONTENDERS.items() if not who.compiled]


pytestmark = pytest.mark.usefixtures("keep_threads")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return save_model_and_text(tmp_path_factory.mktemp("bench"), lines=200)


def bench(place, *more):
    usual = {"--model": place / "model", "--data": place / "text.txt", "--dtype": "float32"}
    usual |= {"--threads": 1, "--batch": 2, "--sequence-length": 64, "--rank": 8, "--rounds": 1}
    given = [str(word) for pair in usual.items() if pair[0] not in more for word in pair]
    memory = [] if "--memory" in more else ["--no-memory"]
    return ["bench", "finetune", *given, *memory, *(str(w) for w in more if w != "--memory")]


@pytest.fixture(scope="module")
def finished(place):
    """The table and the JSON of all contenders."""
    pytest.importorskip("hqq")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        more = ["--rounds", ROUNDS, "--steps", STEPS, "--json", place / "all.json"]
        assert main(bench(place, *more)) == 0
    return printed.getvalue(), json.loads((place / "all.json").read_text())


def rows_of(table):
    """The cells of each row, by its name."""
    lines = table.split("---\n")[1].split("\n\n")[0].splitlines()
    return {name: cells for name, *cells in map(str.split, lines)}


# ---- what is reported --------------------------------------------------------------------


def test_every_contender_has_its_row_and_its_figures(finished):
    table, result = finished
    assert list(rows_of(table)) == NAMES
    assert {len(cells) for cells in rows_of(table).values()} == {10}
    assert sorted(result["contenders"]) == sorted(NAMES)
    assert result["not_measured"] == {}
    for name, figures in result["contenders"].items():
        seconds = figures["seconds"]
        assert 0 < seconds["q20"] <= seconds["median"] <= seconds["q80"]
        assert figures["tokens_per_second"] == pytest.approx(2 * 64 / seconds["median"])
        assert figures["memory"] is None
        assert len(figures["training_losses"]) == result["steps"] == 1 + ROUNDS * STEPS
        assert (figures["quantize_seconds"] is None) == name.startswith("dense")


def test_time_and_ratio_are_medians_of_the_rounds(finished):
    _, result = finished
    rounds = result["rounds"]
    assert len(rounds) == ROUNDS
    for name, figures in result["contenders"].items():
        times = [times[name] for times in rounds]
        ratios = [times[name] / times["hqqlora+peft"] for times in rounds]
        assert figures["seconds"]["median"] == statistics.median(times)
        assert figures["ratio"] == statistics.median(ratios)


def test_the_machine_and_the_work_are_named(finished):
    table, result = finished
    assert result["machine"]["isa"] in ("portable", "avx2", "avx512", "avx512_bf16", "amx")
    assert result["machine"]["threads"] == 1
    assert result["machine"]["versions"]["peft"] is not None
    assert result["model"]["linear_layers"] == 14
    for words in (
        "14 linear layers",
        "2 x 64 tokens",
        f"torch {torch.__version__}",
        "1 threads",
        result["machine"]["isa"],
    ):
        assert words in table


# ---- what is compared --------------------------------------------------------------------


def test_all_learn_but_the_floor(finished):
    _, result = finished
    for name, figures in result["contenders"].items():
        before, after = figures["loss"]["before"], figures["loss"]["after"]
        if name == "dense":
            assert after is None
            continue
        assert after < before - 0.1
        assert all(map(math.isfinite, figures["training_losses"]))


def test_with_peft_and_without_it_the_same_is_learnt(finished):
    """The same data, adapters that start alike, and the same operation."""
    figures = finished[1]["contenders"]
    ours, peft = figures["hqqlora"], figures["hqqlora+peft"]
    assert ours["training_losses"] == pytest.approx(peft["training_losses"], rel=1e-5)
    assert ours["loss"] == pytest.approx(peft["loss"], rel=1e-5)


def test_all_start_from_the_dense_model(finished, place):
    figures = finished[1]["contenders"]
    dense = figures["dense"]["loss"]["before"]
    assert figures["dense+peft"]["loss"]["before"] == pytest.approx(dense, rel=1e-6)
    first = figures["dense+peft"]["training_losses"][0]
    assert first == pytest.approx(figures["dense"]["training_losses"][0], rel=1e-6)
    for name in ("hqqlora", "hqq+peft"):  # 4 bits are near
        assert figures[name]["loss"]["before"] == pytest.approx(dense, rel=0.05)
        assert figures[name]["loss"]["before"] != dense


def test_the_first_that_is_named_is_the_measure(place, capsys):
    assert main(bench(place, "--contenders", "dense", "hqqlora")) == 0
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == ["dense", "hqqlora"]
    assert rows["dense"][2] == "1.00"


def test_a_compiled_contender_learns_what_the_same_one_does_uncompiled(place):
    """One layer: the compiler takes a second or more for each loop of another."""
    save_tiny_llama(place / "one layer", num_hidden_layers=1)
    names = ["hqqlora", "hqqlora-compiled"]
    more = ["--model", place / "one layer", "--json", place / "compiled.json"]
    assert main(bench(place, "--contenders", *names, *more)) == 0
    figures = json.loads((place / "compiled.json").read_text())["contenders"]
    eager, compiled = (figures[name]["training_losses"] for name in names)
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert figures["hqqlora-compiled"]["ratio"] > 0


def test_turns():
    """Every round begins with another; all take the same batches in the same order."""
    calls = []

    class Recorder(Contender):
        def step(self, ids):
            calls.append((self.name, ids.item()))
            return 0.0

    names = ["a", "b", "c"]
    recorders = [Recorder(name, torch.nn.Identity(), None, None) for name in names]
    found = take_turns(recorders, torch.tensor, rounds=4, steps=2)
    assert calls[:3] == [("a", 0), ("b", 0), ("c", 0)]
    assert [name for name, _ in calls[3::2]] == [*"abc", *"bca", *"cab", *"abc"]
    for name in names:
        assert [batch for who, batch in calls if who == name] == list(range(9))
    assert [set(times) for times in found.seconds] == [set(names)] * 4


# ---- memory ------------------------------------------------------------------------------


@pytest.mark.skipif(not can_measure(), reason="needs Linux's /proc/self/clear_refs")
def test_memory_is_what_each_holds(tmp_path):
    """A model of 70 MB in float32, most of it in linear layers."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    save_tiny_llama(tmp_path, **shape, initializer_range=0.02)
    options = BenchOptions(
        str(tmp_path), dtype="float32", batch=2, sequence_length=64, rank=8, threads=1
    )
    ours, dense = (measure_memory(name, options) for name in ("hqqlora", "dense"))
    layers = 4 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 2048)
    quantized = layers * (4 + 2 * 32 / 64) / 8  # float32 scale and zero
    adapters = 4 * 8 * 4 * (2 * 1024 + 2 * 768 + 3 * 2560)
    # the allocator rounds, and a few things beside the weights come and go
    assert dense["held"] == pytest.approx(4 * layers, rel=0.15)
    assert ours["held"] == pytest.approx(quantized + 3 * adapters, rel=0.15, abs=6e6)
    for figures in (ours, dense):
        assert 0 < figures["step"] < figures["training"] - figures["held"]
        assert figures["loading"] > figures["held"]


def test_a_failure_in_the_other_process_is_one_line(tmp_path, capsys, place, monkeypatch):
    monkeypatch.setattr(
        "hqqlora.bench.finetune.measure_memory",
        lambda name, options: measure_memory(
            name, BenchOptions(model=str(tmp_path / "nowhere"))
        ),
    )
    assert main(bench(place, "--memory", "--contenders", "dense")) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hqqlora bench finetune: dense: cannot measure its memory: ")
    assert "there is no such folder or file" in error


# ---- what is not measured ----------------------------------------------------------------


def test_layers_that_are_not_fused_are_not_measured(place, capsys, monkeypatch):
    impostor = CONTENDERS["hqqlora+peft"]._replace(quantize=None)
    monkeypatch.setitem(CONTENDERS, "hqqlora+peft", impostor)
    assert main(bench(place, "--contenders", "hqqlora+peft")) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "hqqlora+peft: not measured" in error
    assert "instead of {'lora_linear': 14}" in error


def test_hqq_on_our_operators_is_not_measured_as_hqq(place, capsys):
    pytest.importorskip("hqq")
    from hqqlora.hqq_patch import patch_hqq, unpatch_hqq

    patch_hqq()
    try:
        assert main(bench(place, "--contenders", "hqq+peft")) == 1
    finally:
        unpatch_hqq()
    assert "{'linear': 14} of hqqlora's operators" in capsys.readouterr().err


def test_a_layer_without_an_adapter_is_not_measured(place, capsys, monkeypatch):
    def adapt_two(model, layers, rank):
        return of_contenders.adapt_with_hqqlora(model, layers[:2], rank)

    monkeypatch.setitem(CONTENDERS, "hqqlora", CONTENDERS["hqqlora"]._replace(adapt=adapt_two))
    assert main(bench(place, "--contenders", "hqqlora")) == 1
    assert "hqqlora: 2 of 14 linear layers have an adapter" in capsys.readouterr().err


@pytest.fixture
def missing(monkeypatch):
    """Lets packages be missing."""
    find = importlib.util.find_spec

    def leave_out(package):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *more: None if name == package else find(name, *more),
        )

    return leave_out


def test_without_hqq_a_line_says_so(place, capsys, missing):
    missing("hqq")
    assert main(bench(place)) == 0
    out = capsys.readouterr().out
    line = "hqq+peft: not measured: the package hqq is not installed: "
    assert line + "pip install 'hqqlora[bench]'" in out
    assert "dense+peft" in out


@pytest.mark.parametrize(
    ("package", "more", "extra"),
    [
        ("hqq", ["--contenders", "dense", "hqq+peft"], "bench"),
        ("peft", [], "hf"),
        ("transformers", ["--contenders", "dense"], "hf"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    place, capsys, missing, package, more, extra
):
    missing(package)
    assert main(bench(place, *more)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("hqqlora bench finetune: ")
    expected = f"the package {package} is not installed: pip install 'hqqlora[{extra}]'"
    assert error.endswith(expected)


# options (files are in the folder above), words of the answer
BAD = [
    (["--rounds", "0"], "argument --rounds: 0 is not an integer of at least 1"),
    (["--steps", "many"], "argument --steps: many is not an integer of at least 1"),
    (["--sequence-length", "1"], "argument --sequence-length: 1 is not an integer"),
    (["--sequence-length", "257"], "--sequence-length 257 exceeds the model's 256"),
    (["--dtype", "float64"], "argument --dtype: invalid choice: 'float64'"),
    (["--contenders", "bitsandbytes"], "argument --contenders: invalid choice"),
    (["--contenders", "dense", "dense"], "argument --contenders: each only once"),
    (["--contenders", "hqqlora", "--rank", "1000"], "r=1000 is not between 1 and 256"),
    (["--model", "nowhere"], "--model nowhere: there is no such folder or file"),
    (["--data", "nowhere.txt"], "nowhere.txt: No such file or directory"),
    (["--json", "nowhere/out.json"], "--json nowhere/out.json: cannot be written"),
    (["--json", "."], "--json .: cannot be written"),
    (["--speed", "9"], "unrecognized arguments: --speed 9"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=lambda value: str(value)[:40])
def test_what_cannot_be_done_is_one_line(place, monkeypatch, capsys, options, words):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert main(bench(place, *options)) in (1, 2)
    shown = capsys.readouterr()
    error = shown.err.replace("\r", "\n").strip().splitlines()[-1]
    assert error.startswith("hqqlora bench finetune: ")
    assert words in error
    assert shown.out == ""
    assert sorted(place.rglob("*")) == before
