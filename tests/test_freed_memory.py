"""A command keeps freed memory where its environment says nothing, and there is room."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hqqlora import cli
from hqqlora.command import freed_memory

ROOM = "MemTotal: 32000000 kB\nMemAvailable: 16000000 kB\n"
NAMES = (*freed_memory._SETTINGS, freed_memory._HUGE_PAGES, "GLIBC_TUNABLES")
STEPS = """\
import resource, sys
from hqqlora.command import freed_memory
freed_memory._free_bytes = lambda: 1e12
if sys.argv[1] == "keep":
    freed_memory.keep_freed_memory()
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(2**24).add_(1)  # 64 MB: glibc keeps up to 32 by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.fixture
def system(monkeypatch, tmp_path):
    """A system with room and without settings; the calls of mallopt; and what files say."""
    calls = []
    files = {"/proc/meminfo": ROOM}
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what is set in a test goes with it
        monkeypatch.delenv(name)

    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    class Library:
        def __init__(self, name):
            self.mallopt = lambda what, value: calls.append((what, value))

    monkeypatch.setattr(freed_memory.Path, "read_text", read_text)
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", Library)
    return calls, files


def test_memory_is_kept(system):
    calls, _ = system
    freed_memory.keep_freed_memory()
    assert calls == [(-3, 2**31 - 1), (-1, 2**31 - 1)]
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "1"),
        ("MALLOC_MMAP_THRESHOLD_", "1"),
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
    ],
)
def test_settings_of_the_user_stay(system, monkeypatch, name, value):
    calls, _ = system
    monkeypatch.setenv(name, value)
    freed_memory.keep_freed_memory()
    assert not calls
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/proc/meminfo", "MemAvailable: 7000000 kB\n"),
        ("/proc/meminfo", ""),
        ("/sys/fs/cgroup/memory.max", "4000000000\n"),
    ],
)
def test_nothing_is_kept_without_room(system, path, text):
    calls, files = system
    files[path] = text
    freed_memory.keep_freed_memory()
    assert not calls


def test_a_container_without_a_limit(system):
    calls, files = system
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    freed_memory.keep_freed_memory()
    assert calls


def test_another_c_library(system, monkeypatch):
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda name: object())
    freed_memory.keep_freed_memory()
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ


@pytest.mark.parametrize(
    ("words", "kept"), [(["train", "--model", "/no/model"], 1), (["info", "/no/model"], 0)]
)
def test_commands_that_train_keep_it(monkeypatch, words, kept):
    begun = []
    monkeypatch.setattr(sys, "argv", ["hqqlora", *words])
    monkeypatch.setattr(cli, "wait_asleep_if_busy", lambda: None)
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: begun.append(1))
    assert cli.main() != 0
    assert len(begun) == kept


def _faults(how: str) -> int:
    environment = {k: v for k, v in os.environ.items() if k not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, how],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_pages_are_not_fetched_again():
    assert _faults("keep") < _faults("give back") / 10
