"""The command line: finding the command, and what failures look like."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny_llama import save_tiny_llama

import hqqlora
from hqqlora.cli import COMMANDS, main
from hqqlora.command.errors import RunError, UsageError

NAMES = [" ".join(name) for name in COMMANDS]


def exit_code_and_output(argv, capsys):
    """argparse ends the process itself for --help and --version."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    return ended.value.code, capsys.readouterr().out


def test_the_commands():
    assert NAMES == [
        "train",
        "quantize",
        "merge",
        "info",
        "bench finetune",
        "bench generate",
        "bench quality",
        "bench quantize",
        "export gguf",
        "export gguf-adapter",
    ]


def test_help_names_all_commands(capsys):
    code, text = exit_code_and_output(["--help"], capsys)
    assert code == 0
    for name, command in COMMANDS.items():
        assert name[0] in text
        group_help = exit_code_and_output([*name[:-1], "--help"], capsys)[1]
        assert command.summary in " ".join(group_help.split())


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command(name, capsys):
    code, text = exit_code_and_output([*name.split(), "--help"], capsys)
    assert code == 0
    assert text.startswith(f"usage: hqqlora {name} ")


def test_version(capsys):
    assert exit_code_and_output(["--version"], capsys) == (
        0,
        f"hqqlora {hqqlora.__version__}\n",
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "hqqlora: the following arguments are required: command (see hqqlora --help)"),
        (["fly"], "hqqlora: argument command: invalid choice: 'fly'"),
        (["bench"], "arguments are required: command (see hqqlora bench --help)"),
        (["bench", "fly"], "hqqlora: argument command: invalid choice: 'fly'"),
        (["--loud", "train"], "hqqlora: unrecognized arguments: --loud"),
        (["finetune"], "hqqlora: argument command: invalid choice: 'finetune'"),
    ],
    ids=" ".join,
)
def test_what_is_no_command(argv, words, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def no_space():
    raise OSError(28, "No space left on device", "a.bin")


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "code", "words"),
    [
        (raising(RunError("it broke")), 1, "it broke"),
        (raising(UsageError("--x is wrong")), 2, "--x is wrong"),
        (no_space, 1, "No space left on device: a.bin"),
        (raising(MemoryError()), 1, "out of memory; less of it"),
        (raising(RuntimeError("x: can't allocate memory: y")), 1, "out of memory; less of it"),
        (raising(KeyboardInterrupt()), 130, "interrupted"),
    ],
    ids=["run", "usage", "system", "memory", "torch's memory", "interrupt"],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_failure_is_one_line_that_names_the_command(
    name, work, code, words, monkeypatch, capsys
):
    failing = COMMANDS[tuple(name.split())]._replace(
        add_arguments=lambda parser: None,
        prepare=lambda namespace: (work, None),
        less_memory="less of it",
    )
    monkeypatch.setitem(COMMANDS, tuple(name.split()), failing)
    assert main(name.split()) == code
    assert capsys.readouterr().err == f"hqqlora {name}: {words}\n"


def test_other_errors_are_not_hidden(monkeypatch):
    failing = COMMANDS["train",]._replace(
        prepare=lambda namespace: (raising(RuntimeError("a bug")), None)
    )
    monkeypatch.setitem(COMMANDS, ("train",), failing)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train"])


def test_a_command_does_not_load_what_others_need():
    script = """
import sys
from hqqlora.cli import main
assert main(["train", "--steps", "0"]) == 2
heavy = ["transformers", "peft", "hqq", "gguf", "hqqlora.bench", "hqqlora.quantize_command",
    "hqqlora.info_command", "hqqlora.training.job"]
loaded = [name for name in heavy if name in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


# ---- hqqlora export gguf -----------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A quantized checkpoint with a tokenizer, and what is none."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from gguf_files import byte_tokenizer

    folder = tmp_path_factory.mktemp("export")
    tokenizer = byte_tokenizer()
    save_tiny_llama(folder / "dense", vocab_size=len(tokenizer))
    for name, options in (("quantized", {"axis": 1}), ("axis 0", {"axis": 0})):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "dense", quantization_config=hqqlora.HqqConfig(group_size=32, **options)
        )
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    model.save_pretrained(folder / "speechless")
    (folder / "empty").mkdir()
    (folder / "garbled").mkdir()
    (folder / "garbled/config.json").write_text("{")
    (folder / "other").mkdir()
    config = {"quantization_config": {"quant_method": "awq"}}
    (folder / "other/config.json").write_text(json.dumps(config))
    return folder


def test_a_checkpoint_becomes_a_gguf_file(checkpoints, tmp_path, monkeypatch, capsys):
    """The one that export_gguf writes of the loaded model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hqqlora.transformers

    monkeypatch.chdir(checkpoints)
    path = tmp_path / "model.gguf"
    assert main(["export", "gguf", "quantized", str(path)]) == 0
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    assert capsys.readouterr().out == f"written: {path}, {size}\n"
    model = AutoModelForCausalLM.from_pretrained("quantized")
    assert sum(isinstance(m, hqqlora.HQQLinear) for m in model.modules()) == 14
    hqqlora.export_gguf(
        model, tmp_path / "expected.gguf", AutoTokenizer.from_pretrained("quantized")
    )
    assert path.read_bytes() == (tmp_path / "expected.gguf").read_bytes()


def test_hqqs_own_checkpoint_becomes_a_gguf_file(checkpoints, tmp_path, capsys):
    from gguf_files import byte_tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints / "dense")
    config = hqqlora.BaseQuantizeConfig(group_size=32)
    hqqlora.AutoHQQHFModel.quantize_model(model, config)
    hqqlora.AutoHQQHFModel.save_quantized(model, str(tmp_path / "hqq"))
    byte_tokenizer().save_pretrained(tmp_path / "hqq")
    path = tmp_path / "model.gguf"
    assert main(["export", "gguf", str(tmp_path / "hqq"), str(path)]) == 0
    again = hqqlora.load_gguf(path, progress=False)
    layer = "model.layers.1.mlp.down_proj"
    assert torch.equal(again.get_submodule(layer).W_q, model.get_submodule(layer).W_q)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "cannot read nowhere/config.json: No such file or directory"),
        (["empty"], "cannot read empty/config.json: No such file or directory"),
        (["garbled"], "garbled/config.json is not a model's configuration"),
        (["dense"], "dense is dense: give a model that was quantized by HQQ"),
        (["other"], "other is quantized by 'awq': give a model that was quantized by HQQ"),
        (["speechless"], "cannot load the tokenizer of speechless (see --tokenizer)"),
        (["axis 0"], "cannot export axis 0: "),
        (["quantized", "--tokenizer", "dense/config.json"], "cannot export quantized: "),
        (["quantized", "--dense-type", "Q2_K"], "argument --dense-type: invalid choice"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_exported(checkpoints, arguments, words, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints)
    assert main(["export", "gguf", *arguments[:1], "out.gguf", *arguments[1:]]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hqqlora export gguf: ")
    assert words in error
    assert not (checkpoints / "out.gguf").exists()


def test_layers_without_a_place_in_gguf_are_rounded_if_asked(checkpoints, tmp_path, capsys):
    path = tmp_path / "model.gguf"
    command = ["export", "gguf", str(checkpoints / "axis 0"), str(path), "--requantize"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert path.exists()
    assert shown.err.startswith("hqqlora export gguf: 14 layers were rounded anew to Q8_0")


def test_a_file_that_cannot_be_written(checkpoints, tmp_path, capsys):
    command = ["export", "gguf", str(checkpoints / "quantized"), str(tmp_path / "no/out.gguf")]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "No such file or directory" in error
    assert str(tmp_path / "no/out.gguf") in error


@pytest.mark.parametrize("package", ["transformers", "accelerate", "gguf"])
def test_a_missing_package_is_named_with_its_command(package, monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    assert main(["export", "gguf", "folder", "out.gguf"]) == 2
    extra = "gguf" if package == "gguf" else "hf"
    expected = f"the package {package} is not installed: pip install 'hqqlora[{extra}]'"
    assert capsys.readouterr().err == f"hqqlora export gguf: {expected}\n"
