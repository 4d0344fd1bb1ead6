"""`hqqlora quantize`, killed at any moment: nothing half written, and the same command ends
with the same files. A full disk, other options and a second process are refused in words."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_command import assert_same_checkpoint, quantize, quantize_slowly

transformers = pytest.importorskip("transformers")

from tiny_models import save_tiny, tiny_llama  # noqa: E402

# In memory already, each run plans in this process rather than in one of its own.
import hqqlora.transformers  # noqa: E402, F401
from hqqlora.quantize_command import job, stream  # noqa: E402
from hqqlora.quantize_command.destination import STATE  # noqa: E402
from hqqlora.quantize_command.options import QuantizeOptions  # noqa: E402
from hqqlora.quantize_command.plan_apart import plan_here  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL_FILES = ("--max-shard-size", "40KB")
FILES = 5


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_llama(num_hidden_layers=4, vocab_size=256)
    return save_tiny(model, tmp_path_factory.mktemp("llama"), torch.bfloat16)


@pytest.fixture(scope="module")
def expected(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run without interruption writes, in five files."""
    folder = tmp_path_factory.mktemp("expected") / "q"
    assert quantize(llama, folder, *SMALL_FILES) == 0
    assert len(list(folder.glob("*.safetensors"))) == FILES
    return folder


@pytest.fixture(scope="module")
def plan_file(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the planning process answers, so that the processes that are killed are up soon."""
    options = QuantizeOptions(str(llama), None, max_shard_size=40_000)
    path = tmp_path_factory.mktemp("plan") / "plan"
    path.write_bytes(pickle.dumps(plan_here(options)))
    return path


def run_and_kill(plan_file: Path, llama: Path, folder: Path, after: float) -> bool:
    """Runs the command in a process of its own and kills it; False if it was faster."""
    # Children of a server, which has no threads that a fork could leave in the middle of
    # something, and torch in memory already.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["quantize_command"])
    begun = context.Event()
    child = context.Process(
        target=quantize_slowly, args=(begun, plan_file, llama, folder, SMALL_FILES)
    )
    child.start()
    assert begun.wait(120)
    child.join(after)
    child.kill()
    child.join(60)
    if child.exitcode == -signal.SIGKILL:
        return True
    assert child.exitcode == 0
    return False


def check_nothing_half_written(folder: Path, expected: Path) -> int:
    """Every file under its own name is the final one. Returns how many hold weights."""
    if not folder.exists():
        return 0
    names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    for name in names:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    if "config.json" in names:
        assert {path.name for path in expected.iterdir()} <= set(names)
    else:
        assert (folder / STATE).exists() or not names
    return sum(name.endswith(".safetensors") for name in names)


def test_killed_at_any_moment_it_goes_on_and_ends_the_same(
    plan_file: Path, llama: Path, expected: Path, tmp_path: Path
) -> None:
    """With more delay each time, until a run comes through before it is killed."""
    generator = random.Random(0)
    folder = tmp_path / "q"
    kills = partly = before = 0
    while run_and_kill(plan_file, llama, folder, generator.uniform(0, 0.1) + 0.04 * kills):
        kills += 1
        done = check_nothing_half_written(folder, expected)
        assert done >= before, "a file that was done is lost"
        partly += 0 < done < FILES
        before = done
        assert kills < 60
    assert kills >= 3
    assert partly >= 1, "no kill hit the middle of the work"
    assert_same_checkpoint(folder, expected)
    assert {p.name for p in folder.iterdir()} == {p.name for p in expected.iterdir()}


class Killed(BaseException):
    """Where a process would have ended, without a handler's help."""


def interrupt(llama: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, file: int) -> None:
    """Leaves `file` whole files, as a killed run would."""
    write = stream.Stream.write_shard
    count = 0

    def failing(self: Any, path: Path, steps: Any) -> None:
        nonlocal count
        if count == file:
            raise Killed
        count += 1
        write(self, path, steps)

    with monkeypatch.context() as patch:
        patch.setattr(job.Stream, "write_shard", failing)
        with pytest.raises(Killed):
            quantize(llama, folder, *SMALL_FILES)


def test_files_that_are_done_are_not_written_again(
    llama: Path,
    expected: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt(llama, tmp_path / "q", monkeypatch, 4)
    assert len(list((tmp_path / "q").glob("*.safetensors"))) == 4
    assert not (tmp_path / "q/config.json").exists()
    (tmp_path / "q/.model-00005-of-00005.safetensors.ab12.tmp").write_text("left by a kill")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "q").glob("*.safetensors")}
    capsys.readouterr()
    assert quantize(llama, tmp_path / "q", *SMALL_FILES, "--threads", "1") == 0
    assert "going on: 4 of 5 files are done" in capsys.readouterr().out
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "q").glob("*.safetensors")}
    assert before.items() <= after.items()
    assert_same_checkpoint(tmp_path / "q", expected)
    assert not list((tmp_path / "q").glob(".*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", "8"), "begun with --bits 4, not 8"),
        (("--group-size", "none"), "begun with --group-size 64, not none"),
        (("--skip-modules",), "begun with --skip-modules lm_head, not (none)"),
        (("--max-shard-size", "1MB"), "begun with --max-shard-size 40000, not 1000000"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_other_options_are_refused(
    options: tuple[str, ...],
    words: str,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt(llama, tmp_path / "q", monkeypatch, 1)
    before = sorted(path.name for path in (tmp_path / "q").iterdir())
    assert quantize(llama, tmp_path / "q", *SMALL_FILES, *options) == 2
    assert words in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == before


def test_a_changed_source_is_refused(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(llama, tmp_path / "dense")
    interrupt(tmp_path / "dense", tmp_path / "q", monkeypatch, 1)
    os.utime(tmp_path / "dense/model.safetensors", (1, 1))
    assert quantize(tmp_path / "dense", tmp_path / "q", *SMALL_FILES) == 2
    assert "was begun from another model" in capsys.readouterr().err


def test_a_folder_with_other_things_is_left_alone(
    llama: Path, expected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert quantize(llama, tmp_path, *SMALL_FILES) == 2
    assert "is not empty, and holds no interrupted run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert quantize(llama, tmp_path / "notes.txt", *SMALL_FILES) == 2
    assert "exists and is not a folder" in capsys.readouterr().err
    assert quantize(llama, expected, *SMALL_FILES) == 2  # finished
    assert quantize(llama, llama, *SMALL_FILES) == 2
    assert "SRC and DST are the same folder" in capsys.readouterr().err


def test_a_second_process_is_refused(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q").mkdir()
    with (tmp_path / "q/.hqqlora-quantize.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert quantize(llama, tmp_path / "q", *SMALL_FILES) == 1
    assert "another process is writing to" in capsys.readouterr().err
    assert quantize(llama, tmp_path / "q", *SMALL_FILES) == 0


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A disk that has room for [n] more calls of write."""
    room = [10**9]
    pwrite = os.pwrite

    def writing(descriptor: int, data: Any, offset: int) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= 1
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", writing)
    return room


def test_a_full_disk_is_named_and_the_same_command_goes_on(
    llama: Path,
    expected: Path,
    tmp_path: Path,
    full_disk: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    full_disk[0] = 200
    assert quantize(llama, tmp_path / "q", *SMALL_FILES) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in error
    assert f"{tmp_path}/q/model-0000" in error
    assert "the same command goes on from here" in error
    assert 0 < check_nothing_half_written(tmp_path / "q", expected) < FILES
    assert not list((tmp_path / "q").glob("*.tmp"))
    full_disk[0] = 10**9
    assert quantize(llama, tmp_path / "q", *SMALL_FILES) == 0
    assert_same_checkpoint(tmp_path / "q", expected)


def test_a_disk_that_is_too_small_is_told_before_the_work(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert quantize(llama, tmp_path / "q", *SMALL_FILES) == 1
    assert "but its disk has 0.0 MB free" in capsys.readouterr().err
    assert not list((tmp_path / "q").glob("*.safetensors"))


def test_a_file_in_another_form_is_made_anew(
    llama: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(llama, tmp_path / "q", monkeypatch, 2)
    path = tmp_path / "q/model-00001-of-00005.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert quantize(llama, tmp_path / "q", *SMALL_FILES) == 0
    assert_same_checkpoint(tmp_path / "q", expected)


def test_a_damaged_state_is_told(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt(llama, tmp_path / "q", monkeypatch, 1)
    (tmp_path / "q" / STATE).write_text("{}")
    assert quantize(llama, tmp_path / "q", *SMALL_FILES) == 2
    assert "is damaged: remove the folder" in capsys.readouterr().err


def test_an_error_of_the_planning_process_is_that_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a command, transformers is loaded in another process (see test_quantize_memory)."""
    monkeypatch.delitem(sys.modules, "hqqlora.transformers")
    assert quantize(tmp_path / "nowhere", tmp_path / "q") == 2
    assert "nowhere: there is no such folder" in capsys.readouterr().err
