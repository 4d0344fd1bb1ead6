"""Quantized layers on several ranks, as two and four processes on the CPU: DDP, FSDP2, tensor
parallelism, DeepSpeed, torch.distributed.checkpoint, and quantizing by the ranks that share a
model. What is checked stands in distributed_*.py and tensor_parallel_*.py, a test for each.
Last come programs as they are launched: the example, and `accelerate launch`.

One file, as all its processes are forked from the one that has imported the libraries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

import distributed_checkpoints
import distributed_deepspeed
import distributed_layers
import distributed_loading
import distributed_policies
import distributed_training
import tensor_parallel_layers
import tensor_parallel_models
from distributed_processes import checks_of, outcome, run_checks, run_script
from tiny_llama import patterned_text

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

TESTS = Path(__file__).parent
EXAMPLE = TESTS.parent / "examples" / "finetune_fsdp2.py"
MODULES = (
    distributed_layers,
    distributed_training,
    distributed_policies,
    distributed_checkpoints,
    distributed_loading,
    tensor_parallel_layers,
    tensor_parallel_models,
)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_checks(MODULES, tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_checks(MODULES, tmp_path_factory.mktemp("four"), 4)


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not distributed_deepspeed.is_installed():
        pytest.skip("DeepSpeed is not installed: make test does that, as .venv/deepspeed")
    return run_checks([distributed_deepspeed], tmp_path_factory.mktemp("deepspeed"), 2)


@pytest.mark.parametrize("check", checks_of(MODULES, 2))
def test_in_two_processes(two: Path, check: str) -> None:
    outcome(two, check, 2)


@pytest.mark.parametrize("check", checks_of(MODULES, 4))
def test_in_four_processes(four: Path, check: str) -> None:
    outcome(four, check, 4)


@pytest.mark.parametrize("check", checks_of([distributed_deepspeed], 2))
def test_with_deepspeed(deepspeed: Path, check: str) -> None:
    outcome(deepspeed, check, 2)


# ---- programs, as they are launched ------------------------------------------------------


def losses(printed: str) -> dict[int, float]:
    lines = re.findall(r"^step (\d+): loss ([\d.]+)$", printed, re.MULTILINE)
    return {int(step): float(loss) for step, loss in lines}


def test_example_learns_and_goes_on_with_another_number_of_processes(
    tiny: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(patterned_text(200))
    arguments = ["--model", str(tiny), "--text", str(text), "--output", str(tmp_path / "o")]
    arguments += ["--length", "32", "--batch", "2", "--rank", "4", "--group-size", "32"]
    arguments += ["--learning-rate", "1e-2", "--steps"]
    first = losses(run_script(EXAMPLE, [*arguments, "8"], tmp_path, world=2))
    assert list(first) == list(range(1, 9))
    assert first[8] < 0.9 * first[1]
    rest = losses(run_script(EXAMPLE, [*arguments, "10"], tmp_path, world=1))
    assert list(rest) == [9, 10]
    assert rest[9] < 0.9 * first[1]


def documented_configuration() -> str:
    """With two processes of this machine, and in float32, where every bit can be compared."""
    page = (TESTS.parent / "docs" / "distributed.md").read_text()
    [text] = re.findall(r"```yaml\n(compute_environment.*?)```", page, re.DOTALL)
    for documented, here in (
        ("num_processes: 8", "num_processes: 2"),
        ("mixed_precision: bf16", "mixed_precision: 'no'"),
    ):
        assert documented in text
        text = text.replace(documented, here)
    return text


def test_accelerate_launch_with_fsdp2_is_one_process(tmp_path: Path) -> None:
    config = tmp_path / "fsdp2.yaml"
    config.write_text(documented_configuration())
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--main_process_port", "0", str(TESTS / "distributed_accelerate.py")]
    done = subprocess.run(
        [*launch, str(tmp_path / "state")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal to one process") == 2
