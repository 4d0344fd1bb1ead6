"""Whatever goes wrong while something is saved, its old files or its new ones are there, each
whole; saving again succeeds and leaves no temporary files. (`python -m tests.faults` does it
more often, and prints a table.)"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("gguf")

import faults
from fault_writers import (
    Adapter,
    Gguf,
    GgufAdapter,
    Pretrained,
    Qmodel,
    Quantize,
    Train,
    TrainCheckpoint,
    Writer,
    leavings_in,
)
from faults import Prepared, Result, try_fault

pytestmark = pytest.mark.usefixtures("one_thread")

OURS = [
    Adapter(exists=False),
    Adapter(exists=True),
    TrainCheckpoint(),
    Qmodel(),
    Gguf(),
    GgufAdapter(),
]


@pytest.fixture(scope="module", params=OURS, ids=lambda writer: writer.name)
def prepared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prepared]:
    return Prepared(request.param, tmp_path_factory.mktemp("faults") / "place")


def test_killed_before_any_change_of_the_file_system(prepared: Prepared) -> None:
    """Each fifth one, from another on for each writer: all are in the long version."""
    found = set()
    for number in range(len(prepared.writer.name) % 5, len(prepared.changes), 5):
        result = try_fault(prepared, faults.kill_at_change(number), None)
        assert result.outcome == "killed", (number, result)
        assert not faults.is_lost(result), (number, result)
        found.add(result.verdict)
    assert found >= {"old"}, found


def test_killed_in_the_middle_of_a_write(prepared: Prepared) -> None:
    for number in (1, prepared.largest // 2):
        result = try_fault(prepared, faults.kill_at_byte(number), None)
        assert result.outcome == "killed", (number, result)
        assert result.verdict == "old", (number, result)
        assert not result.again, (number, result)


def test_a_full_disk_at_any_write_leaves_the_old_files_alone(prepared: Prepared) -> None:
    for number in (0, prepared.largest // 2, prepared.largest - 1):
        result = try_fault(prepared, faults.no_room_beyond(number), None)
        check_refused(result, errno.EFBIG)
        assert result.verdict == "old", (number, result)


def test_an_error_of_any_change_is_an_oserror_and_nothing_is_half_written(
    prepared: Prepared,
) -> None:
    for number, change in enumerate(prepared.changes):
        if number % 5 != len(prepared.writer.name) % 5 or change in ("rmdir", "remove"):
            continue  # what is removed then has served its purpose already
        result = try_fault(prepared, faults.fail_at_change(number), None)
        if result.outcome == "done":  # the folder that was to be made is there
            assert (change, result.verdict) == ("mkdir", "new")
            continue
        check_refused(result, errno.ENOSPC)


def test_a_read_only_folder_is_refused_and_left_as_it_was(prepared: Prepared) -> None:
    result = try_fault(prepared, faults.fail_at_every_change(errno.EROFS), None)
    check_refused(result, errno.EROFS)
    assert result.verdict == "old", result


def check_refused(result: Result, code: int) -> None:
    kind, _, message = result.outcome.partition(": ")
    assert kind in ("OSError", "RunError", "PermissionError", "FileNotFoundError"), result
    assert errno.errorcode[code] in message or os.strerror(code) in message, result
    assert ".tmp" not in message, "nobody knows the temporary file's name"
    assert not faults.is_lost(result), result
    assert not result.leavings, result


@pytest.mark.parametrize("writer", [Quantize(), Pretrained()], ids=lambda w: w.name)
def test_killed_at_random(writer: Writer, tmp_path: Path) -> None:
    prepared = Prepared(writer, tmp_path / "place")
    generator = random.Random(1)
    for _ in range(4):
        where, fault, delay = faults.random_kill(prepared, generator)
        result = try_fault(prepared, fault, delay)
        assert result.outcome in ("killed", "done")
        assert not faults.is_lost(result), (where, result)


def test_a_training_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    """As its last file, the log, is put in its place: adapter and checkpoint are there."""
    prepared = Prepared(Train(), tmp_path / "place")
    last = len(prepared.changes) - 1 - prepared.changes[::-1].index("rename")
    result = try_fault(prepared, faults.kill_at_change(last), None)
    assert result == Result("killed", "some new", 1, "")


def test_the_harness_sees_a_save_that_is_not_atomic(tmp_path: Path) -> None:
    """What would be a bug here."""

    class Careless(Adapter):
        def write_new(self, folder: Path) -> None:
            content = b"{" + b" " * 1000 + b"}"
            (folder / "adapter/adapter_config.json").write_bytes(content)
            (folder / "adapter/.x.tmp").write_bytes(b"")

    prepared = Prepared(Careless(exists=True), tmp_path / "place")
    result = try_fault(prepared, faults.kill_at_byte(500), None)
    assert result.verdict == (
        "LOST: adapter/adapter_config.json is neither the old one nor the new one"
    )
    assert "left after saving again" in try_fault(prepared, faults.no_fault, None).again
    assert leavings_in(tmp_path)
