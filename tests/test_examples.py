"""The examples as a user runs them: each in a process of its own, and its losses fall."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import c_library
import pytest
from smollm2_folder import EXAMPLES


def run(*command, **options) -> str:
    """What it prints; nothing may go to stderr."""
    output, errors = run_loudly(*command, **options)
    assert errors == ""
    return output


def run_loudly(*command, **options) -> tuple[str, str]:
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=600, **options
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout, result.stderr


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


# ---- Hugging Face's workflows, on SmolLM2 --------------------------------------------------


def run_example(name: str, model: Path, folder: Path, *arguments: str) -> str:
    """In `folder`; on one thread, since threads that a busy machine keeps apart wait for each
    other."""
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text().splitlines()) <= 90
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, script, "--model", model, *arguments]
    output, _ = run_loudly(*command, cwd=folder, env=environment)
    print(output)
    return output


def numbers(pattern: str, output: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, output)]


def test_quickstart(smollm2: Path, tmp_path: Path):
    output = run_example("quickstart", smollm2, tmp_path, "--tokens", "8")
    (size,) = numbers(r": (\S+) MB", output)
    assert 110 < size < 120  # 59.7 of linear layers, 56.6 of embeddings in bfloat16
    assert "What is the capital of France? -> The capital of France is Paris." in output


def test_mixed_precision(smollm2: Path, tmp_path: Path):
    output = run_example("mixed_precision", smollm2, tmp_path, "--windows", "2")
    four, three, between = numbers(r" (\S+) MB", output)
    assert three < between < four
    assert four == pytest.approx(106.2e6 * 4.5 / 8e6, rel=1e-3)
    four, three, between = numbers(r" MB +(\S+)", output)
    assert 10 < four < between < three < 100


def test_finetune_peft(smollm2: Path, tmp_path: Path):
    options = ["--steps", "6", "--length", "64", "--batch", "2", "--output", "adapter"]
    output = run_example("finetune_peft", smollm2, tmp_path, *options)
    assert len(numbers(r"step +\d+  loss (\S+)", output)) == 6
    ((before, after),) = re.findall(r"held-out loss (\S+) -> (\S+)", output)
    assert float(after) < float(before) - 0.1
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 9e6


def test_qlora_trainer(smollm2: Path, tmp_path: Path):
    """And what it saved last is where it goes on."""
    options = ["--length", "32", "--save-steps", "3", "--steps"]
    output = run_example("qlora_trainer", smollm2, tmp_path, *options, "5")
    first = numbers(r"'loss': '(\S+)'", output)
    assert len(first) == 5
    (perplexity,) = numbers(r"held-out perplexity: (\S+)", output)
    assert 5 < perplexity < 100
    assert (tmp_path / "qlora-run" / "adapter" / "adapter_config.json").exists()
    shutil.rmtree(tmp_path / "qlora-run" / "checkpoint-5")
    output = run_example("qlora_trainer", smollm2, tmp_path, *options, "5", "--resume")
    assert numbers(r"'loss': '(\S+)'", output) == first[3:]
    assert numbers(r"held-out perplexity: (\S+)", output) == [perplexity]


def test_save_and_reload(smollm2: Path, tmp_path: Path):
    output = run_example("save_and_reload", smollm2, tmp_path, "--steps", "3")
    assert output.count("the same logits: True") == 2
    quantized, adapter, merged, dense = numbers(r": (\S+) MB", output)
    assert adapter < 20 < quantized < merged < 130 < 260 < dense  # merged has the tokenizer too
    (lost,) = numbers(r"up to (\S+)% of a weight", output)
    assert 0 < lost < 2
    in_bits, exactly = numbers(r"at (\S+)% of the places", output)
    assert in_bits > 70
    assert exactly > 90


def test_check_quality(smollm2: Path, tmp_path: Path):
    options = ["--nbits", "4", "3", "--windows", "2"]
    output = run_example("check_quality", smollm2, tmp_path, *options)
    assert re.findall(r"^(\w+) ", output, re.MULTILINE) == ["dense", "4", "3"]
    dense, four, three = numbers(r"perplexity +(\S+)", output)
    assert 10 < dense < four < 40 < three
    same, nearly, often = numbers(r"same next token +(\S+)%", output)
    assert same == 100 > nearly > 60 > often
    assert output.count("'The capital of France is Paris") == 2
