"""examples/finetune_fsdp2.py under torchrun, in two processes on the CPU; then in one."""

from __future__ import annotations

import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_llama import patterned_text

SCRIPT = Path(__file__).parent.parent / "examples" / "finetune_fsdp2.py"


def losses(printed: str) -> dict[int, float]:
    lines = re.findall(r"^step (\d+): loss ([\d.]+)$", printed, re.MULTILINE)
    return {int(step): float(loss) for step, loss in lines}


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
def test_example_learns_and_goes_on_with_another_number_of_processes(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(patterned_text(200))
    arguments = ["--model", str(tiny), "--text", str(text), "--output", str(tmp_path / "o")]
    arguments += ["--length", "32", "--batch", "2", "--rank", "4", "--group-size", "32"]
    arguments += ["--learning-rate", "1e-2", "--steps"]

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(SCRIPT), *arguments, "8"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first = losses(done.stdout)
    assert list(first) == list(range(1, 9))
    assert first[8] < 0.9 * first[1]

    # What torchrun tells its only process; in this one, which has torch imported already.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in {**told, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "10"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rest = losses(capsys.readouterr().out)
    assert list(rest) == [9, 10]
    assert rest[9] < 0.9 * first[1]
