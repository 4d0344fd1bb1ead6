"""The examples as a user runs them: each in a process of its own, and its losses fall."""

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import c_library
import pytest
import torch
from forked_python import ForkedPython
from smollm2_folder import EXAMPLES
from tiny_llama import save_tiny_llama

RunExample = Callable[..., str]


def run(*command, **options) -> str:
    """What it prints; nothing may go to stderr."""
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=600, **options
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    assert result.stderr == ""
    return result.stdout


def test_minimal_c(tmp_path):
    """Compiles without a warning, outside the project, against what was installed."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or "cc"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror"]
    source = shutil.copy(EXAMPLES / "minimal.c", tmp_path)
    library = c_library.path()
    link = [f"-I{c_library.header().parent}", f"-L{library.parent}", "-lhqqlora"]
    link.append(f"-Wl,-rpath,{library.parent}")
    run(*compiler.split(), *flags, source, "-o", tmp_path / "minimal", *link)
    output = run(tmp_path / "minimal")
    assert re.match(r"192 x 256 weight: 196608 bytes in fp32, 30720 quantized\n", output)
    losses = [float(loss) for loss in re.findall(r"loss +(\S+)", output)]
    assert len(losses) == 6
    assert losses[-1] < 0.01 * losses[0]
    assert run(tmp_path / "minimal") == output  # and repeats


def test_train_loop():
    """Under 60 lines; torch.compile changes nothing."""
    script = EXAMPLES / "train_loop.py"
    assert len(script.read_text().splitlines()) < 60
    header, *rows = run(sys.executable, script, cwd="/").splitlines()
    assert header.split() == ["step", "eager", "compiled"]
    eager, compiled = zip(
        *((float(e), float(c)) for _, e, c in map(str.split, rows)), strict=True
    )
    assert eager == compiled
    assert eager[-1] < 0.1 * eager[0]


# ---- Hugging Face's workflows, on a small random Llama ---------------------------------------

# What its linear layers have of weights, and of rows in A and columns in B for each of rank.
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
WEIGHTS = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
LORA_ROWS = 2 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 512))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama in bfloat16 with a byte tokenizer, most of it in linear layers."""
    import transformers

    folder = save_tiny_llama(tmp_path_factory.mktemp("small"), **SHAPE)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def forked() -> Iterator[ForkedPython]:
    """Nothing of this library is imported for an example beforehand."""
    for package in ("transformers", "accelerate", "peft"):
        pytest.importorskip(package)
    python = ForkedPython("transformers.trainer", "transformers.models.llama", "peft")
    yield python
    python.close()


@pytest.fixture
def run_example(forked: ForkedPython, tmp_path: Path) -> RunExample:
    """Runs the example of a name on a model's folder, in `tmp_path`; returns what it prints. On
    one thread, since threads that a busy machine keeps apart wait for each other."""

    def run_it(name: str, model: Path, *arguments: str) -> str:
        script = EXAMPLES / f"{name}.py"
        assert len(script.read_text().splitlines()) <= 90
        status, output, errors = forked.run(
            script, ["--model", model, *arguments], folder=tmp_path
        )
        assert status == 0, f"{name} {arguments}\n{output}\n{errors}"
        print(output)
        return output

    return run_it


def numbers(pattern: str, output: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, output)]


def test_finetune_peft(run_example: RunExample, small: Path, tmp_path: Path):
    options = ["--steps", "12", "--length", "64", "--batch", "2", "--output", "adapter"]
    output = run_example("finetune_peft", small, *options)
    assert len(numbers(r"step +\d+  loss (\S+)", output)) == 12
    ((before, after),) = re.findall(r"held-out loss (\S+) -> (\S+)", output)
    assert float(after) < float(before) - 0.1
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert 0 < size - 4 * 16 * LORA_ROWS < 10_000  # float32, and the names of 28 tensors


def test_qlora_trainer(run_example: RunExample, small: Path, tmp_path: Path):
    """And what it saved last is where it goes on."""
    options = ["--length", "64", "--save-steps", "8", "--steps", "12"]
    output = run_example("qlora_trainer", small, *options)
    first = numbers(r"'loss': '(\S+)'", output)
    assert len(first) == 12
    assert sum(first[-3:]) < sum(first[:3]) - 0.3
    (perplexity,) = numbers(r"held-out perplexity: (\S+)", output)
    assert math.log(perplexity) == pytest.approx(first[-1], rel=0.1)
    assert (tmp_path / "qlora-run" / "adapter" / "adapter_config.json").exists()
    shutil.rmtree(tmp_path / "qlora-run" / "checkpoint-12")
    output = run_example("qlora_trainer", small, *options, "--resume")
    assert numbers(r"'loss': '(\S+)'", output) == first[8:]
    assert numbers(r"held-out perplexity: (\S+)", output) == [perplexity]


def test_save_and_reload(run_example: RunExample, small: Path):
    output = run_example("save_and_reload", small, "--steps", "3")
    assert output.count("the same logits: True") == 2
    quantized, adapter, merged, dense = numbers(r": (\S+) MB", output)
    # 4.5 bits of a weight or 16, and embeddings of 0.13 MB; merged has the tokenizer too
    assert adapter == pytest.approx(4 * 8 * LORA_ROWS / 1e6, abs=0.06)
    assert quantized == pytest.approx(WEIGHTS * 4.5 / 8e6 + 0.13, abs=0.1)
    assert quantized <= merged < quantized + 0.1
    assert dense == pytest.approx(WEIGHTS * 2 / 1e6 + 0.13, abs=0.1)
    (lost,) = numbers(r"up to (\S+)% of a weight", output)
    assert 0 < lost < 2
    in_bits, exactly = numbers(r"at (\S+)% of the places", output)
    assert in_bits > 70
    assert exactly > 90


# ---- what only a model that knows something shows, on SmolLM2 --------------------------------


def test_quickstart(run_example: RunExample, smollm2: Path):
    output = run_example("quickstart", smollm2, "--tokens", "8")
    (size,) = numbers(r": (\S+) MB", output)
    assert 110 < size < 120  # 59.7 of linear layers, 56.6 of embeddings in bfloat16
    assert "What is the capital of France? -> The capital of France is Paris." in output


def test_mixed_precision(run_example: RunExample, smollm2: Path):
    output = run_example("mixed_precision", smollm2, "--windows", "1")
    four, three, between = numbers(r" (\S+) MB", output)
    assert three < between < four
    assert four == pytest.approx(106.2e6 * 4.5 / 8e6, rel=1e-3)
    four, three, between = numbers(r" MB +(\S+)", output)
    assert 10 < four < between < three < 100


def test_check_quality(run_example: RunExample, smollm2: Path):
    options = ["--nbits", "4", "3", "--windows", "1"]
    output = run_example("check_quality", smollm2, *options)
    assert re.findall(r"^(\w+) ", output, re.MULTILINE) == ["dense", "4", "3"]
    dense, four, three = numbers(r"perplexity +(\S+)", output)
    assert 10 < dense < four < 40 < three
    same, nearly, often = numbers(r"same next token +(\S+)%", output)
    assert same == 100 > nearly > 60 > often
    assert output.count("'The capital of France is Paris") == 2
