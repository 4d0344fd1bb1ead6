"""A short run of fuzz/readers.py, always with the same inputs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

import readers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> list[readers.Target]:
    torch.manual_seed(0)
    return readers.targets(tmp_path_factory.mktemp("made"))


def test_every_reader_reads_its_sound_file(
    targets: list[readers.Target], tmp_path: Path
) -> None:
    for target in targets:
        assert readers.attempt(target, target.content, tmp_path) == "read", target.name


def test_changed_files_are_read_or_refused(
    targets: list[readers.Target], tmp_path: Path
) -> None:
    for target in targets:
        outcomes, wrong = readers.run_batch(target, 0, 60, tmp_path)
        assert not wrong, (target.name, wrong[0][0])
        assert outcomes["refused"] >= 10, (target.name, outcomes)


@pytest.mark.parametrize(
    ("bug", "answer"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "died: SIGSEGV"),
        ("os.system('true')", "died: exit 99"),
        ("bytearray(8 * 2**30)", "MemoryError: "),
        ("{}['a']", "KeyError: 'a'"),
        ("time.sleep(60)", "died: SIGALRM"),
    ],
)
def test_the_fuzzer_sees_a_bug(
    bug: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "SECONDS_EACH", 1)
    target = readers.Target("bug", "a", b"sound" * 10, lambda path: eval(bug, vars(readers)))
    _, wrong = readers.run_batch(target, 0, 1, tmp_path)
    assert [said for said, _ in wrong] == [answer]
