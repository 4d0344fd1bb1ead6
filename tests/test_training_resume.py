"""A run that is killed, or stopped, or whose disk is full, and what can be made of it then."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
from tiny_llama import save_model_and_text

from hqqlora.cli import main
from hqqlora.importance import body_importance
from hqqlora.training import loop
from hqqlora.training.next_token_loss import NextTokenLoss

pytest.importorskip("transformers")

STEPS = 9
FILES = ["adapter", "importance.safetensors", "loss.png", "train_log.json"]

# Runs a command line, and dies in the middle of writing its n-th checkpoint: the temporary
# file is complete, and not yet renamed.
DIE_WRITING = """
import os, signal, sys
from hqqlora import files
from hqqlora.cli import main

left, put_in_place = [int(sys.argv[1])], files._put_in_place

def put_in_place_or_die(temporary, target):
    left[0] -= target.name == "checkpoint.pt"
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    put_in_place(temporary, target)

files._put_in_place = put_in_place_or_die
sys.exit(main(sys.argv[2:]))
"""


pytestmark = pytest.mark.usefixtures("keep_threads")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return save_model_and_text(tmp_path_factory.mktemp("resume"), lines=200)


@pytest.fixture(scope="module")
def uninterrupted(place):
    assert main(train(place, place / "uninterrupted")) == 0
    return results(place / "uninterrupted")


def train(place, output, *more):
    """Few windows, so that the steps go through several epochs; and dropout, which draws."""
    return [
        *("train", "--model", str(place / "model"), "--data", str(place / "text.txt")),
        *("--threads", "1", "--sequence-length", "128", "--batch", "4"),
        *("--steps", str(STEPS), "--warmup", "2", "--learning-rate", "1e-2", "--rank", "4"),
        *("--dropout", "0.2", "--sample-tokens", "3", "--checkpoint-every", "2"),
        *("--eval-every", "5", "--micro-batch", "3"),
        *("--output", str(output), *more),
    ]


def results(folder):
    log = json.loads((folder / "train_log.json").read_text())
    steps = [(s["loss"], s["learning_rate"], s["gradient_norm"]) for s in log["steps"]]
    adapter = (folder / "adapter/adapter_model.safetensors").read_bytes()
    return steps, log["held_out_losses"], log["perplexity"], log["sample"], adapter


def stop_after(monkeypatch, step, number=signal.SIGINT):
    """Sends this process a signal in the middle of a step (from 1)."""
    take = loop._take_step

    def take_and_signal(loss, windows, optimizer, options, progress, parameters):
        if progress.step + 1 == step:
            os.kill(os.getpid(), number)
        take(loss, windows, optimizer, options, progress, parameters)

    monkeypatch.setattr(loop, "_take_step", take_and_signal)


def test_killed_and_stopped_runs_end_as_if_nothing_had_happened(
    place, uninterrupted, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "run"
    command = [sys.executable, "-c", DIE_WRITING, "4", *train(place, output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    names = sorted(p.name for p in output.iterdir())
    # the third checkpoint, what was to become the fourth, and what was measured in between
    assert names[0].endswith(".tmp")
    assert names[1:] == ["adapter-best", "checkpoint.pt"]

    monkeypatch.chdir(tmp_path)  # not where it began, and by another route
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        assert main(["train", "--resume", "--output", "run"]) == 130
    captured = capsys.readouterr()
    assert "resumed  after step 4 of 9" in captured.out
    last = captured.err.strip().splitlines()[-1]
    assert last == (
        "hqqlora train: stopped after step 7 of 9; to go on: "
        "hqqlora train --resume --output run"
    )
    assert sorted(p.name for p in output.iterdir()) == ["adapter-best", "checkpoint.pt"]

    assert main(["train", "--resume", "--output", str(output)]) == 0
    assert "resumed  after step 7 of 9" in capsys.readouterr().out
    assert results(output) == uninterrupted
    assert sorted(p.name for p in output.iterdir()) == FILES


def test_importance_is_not_measured_again(place, uninterrupted, tmp_path, monkeypatch, capsys):
    """Another processor would find other last bits, and so another model."""
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert main(train(place, output)) == 130

    def other(model):
        return {name: values + 1e-6 for name, values in body_importance(model).items()}

    monkeypatch.setattr("hqqlora.training.job.body_importance", other)
    assert main(["train", "--resume", "--output", str(output)]) == 0
    assert "resumed  after step 3" in capsys.readouterr().out
    assert results(output) == uninterrupted


def test_a_request_to_terminate_is_honoured(place, tmp_path, monkeypatch, capsys):
    stop_after(monkeypatch, 1, signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert main(train(place, tmp_path / "run", "--checkpoint-every", "0")) == 143
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert "stopped after step 1 of 9" in capsys.readouterr().err


def test_ctrl_c_before_the_first_step_leaves_nothing(place, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("hqqlora.training.job.load_model", interrupted)
    assert main(train(place, tmp_path / "run")) == 130
    assert capsys.readouterr().err == "hqqlora train: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def stopped(place, tmp_path, monkeypatch, capsys):
    """The folder of a run that was stopped after two steps."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert main(train(place, tmp_path / "run")) == 130
    capsys.readouterr()
    return tmp_path / "run"


def test_an_unfinished_run_is_not_begun_again_by_mistake(place, stopped, capsys):
    assert main(train(place, stopped)) == 2
    assert "--resume continues it" in capsys.readouterr().err
    assert main(train(place, stopped, "--overwrite")) == 0
    assert main(train(place, stopped, "--overwrite", "--seed", "1")) == 0


def test_what_changes_the_result_cannot_change(place, stopped, capsys):
    resume = ["train", "--resume", "--output", str(stopped)]
    assert main([*resume, "--rank", "5"]) == 2
    assert capsys.readouterr().err == (
        "hqqlora train: --rank is 5, but the run to resume has 4\n"
    )
    text = place / "text.txt"
    content = text.read_text()
    try:
        text.write_text(content.replace("3 times", "4 times", 1))
        assert main(resume) == 2
    finally:
        text.write_text(content)
    assert "the text is not what it was" in capsys.readouterr().err
    assert main([*resume, "--rank", "4", "--checkpoint-every", "50"]) == 0


def test_a_damaged_checkpoint_is_refused(stopped, capsys):
    checkpoint = stopped / "checkpoint.pt"
    content = checkpoint.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\0" * 100):
        checkpoint.write_bytes(damaged)
        assert main(["train", "--resume", "--output", str(stopped)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "cannot read the checkpoint" in error


def test_a_full_disk_at_the_first_checkpoint(place, tmp_path, capsys):
    """No file may grow beyond what the text needs: all a full disk does, to one process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        code = main(train(place, tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("hqqlora train: cannot write the checkpoint ")
    assert last.endswith("File too large")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "loss.png", "train_log.json"])
def test_a_full_disk_at_the_end(place, uninterrupted, tmp_path, monkeypatch, capsys, file):
    replace = os.replace

    def no_space(source, target):
        if os.path.basename(target) == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        assert main(train(place, output)) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in last
    assert last.endswith(f"to go on: hqqlora train --resume --output {output}")
    assert not list(output.rglob("*.tmp"))
    if file == "adapter_model.safetensors":
        assert not (output / "adapter").exists()
    assert main(["train", "--resume", "--output", str(output)]) == 0
    assert results(output) == uninterrupted


def test_a_loss_that_is_not_finite_ends_the_run(place, tmp_path, monkeypatch, capsys):
    """Before it spoils the adapter: the checkpoint holds the last good step."""
    backward, calls = NextTokenLoss.backward, []

    def failing(self, *part, **rest):
        calls.append(part)  # two a step
        return backward(self, *part, **rest) if len(calls) < 8 else float("nan")

    monkeypatch.setattr(NextTokenLoss, "backward", failing)
    assert main(train(place, tmp_path / "run")) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("hqqlora train: step 4: the loss is nan")
    assert last.endswith("try a lower --learning-rate")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoint.pt"]


def test_a_loss_that_is_not_finite_is_traced_to_its_layer(place, tmp_path, monkeypatch, capsys):
    """An infinite element gets into the adapter after the third step."""
    take = loop._take_step

    def take_and_spoil(loss, windows, optimizer, options, progress, parameters):
        take(loss, windows, optimizer, options, progress, parameters)
        if progress.step == 3:
            layer = loss.model.get_submodule("model.layers.1.mlp.up_proj")
            layer.lora_B.data[5, 1] = float("inf")

    monkeypatch.setattr(loop, "_take_step", take_and_spoil)
    assert main(train(place, tmp_path / "run")) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(
        "hqqlora train: step 4: the loss is nan and the gradient's norm nan; "
    )
    assert last.endswith(
        "it begins in the adapter of model.layers.1.mlp.up_proj: lora_B has 1 infinite of 512 "
        "elements; try a lower --learning-rate"
    )
