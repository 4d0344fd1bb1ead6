"""Whether threads spin or sleep is decided by what others do with our processors."""

from __future__ import annotations

import os
import sys

import pytest

from hqqlora import cli
from hqqlora.command import thread_waiting

BEFORE = """\
cpu  400 0 100 9000 100 0 0 0 0 0
cpu0 100 0 20 800 80 0 0 0 0 0
cpu1 100 0 20 880 0 0 0 0 0 0
cpu2 100 0 20 880 0 0 0 0 0 0
intr 5 1 2
"""
AFTER = """\
cpu  900 0 100 9000 100 0 0 0 0 0
cpu0 110 5 25 860 100 0 0 0 7 7
cpu1 160 0 20 880 0 10 20 10 60 0
cpu2 100 0 20 980 0 0 0 0 0 0
intr 9 1 2
"""


@pytest.mark.parametrize(
    ("processors", "fraction"),
    [({0}, 0.2), ({1}, 1.0), ({2}, 0.0), ({0, 1}, 0.6), ({0, 1, 2}, 0.4), ({7}, 0.0)],
)
def test_only_our_processors_count(monkeypatch, processors, fraction):
    texts = iter([BEFORE, AFTER])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: processors)
    monkeypatch.setattr(thread_waiting.Path, "read_text", lambda path: next(texts))
    monkeypatch.setattr(thread_waiting.time, "sleep", lambda seconds: None)
    assert thread_waiting.busy_fraction() == pytest.approx(fraction)


def test_a_system_that_does_not_say(monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(thread_waiting.Path, "read_text", missing)
    assert thread_waiting.busy_fraction() == 0


@pytest.mark.parametrize(
    ("busy", "environment", "restarts"),
    [
        (0.9, {}, True),
        (0.05, {}, False),
        (0.9, {"OMP_WAIT_POLICY": "active"}, False),
        (0.9, {"GOMP_SPINCOUNT": "1000"}, False),
    ],
)
def test_the_command_begins_again_where_others_are_busy(
    monkeypatch, capsys, busy, environment, restarts
):
    begun = []
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = ["hqqlora", "train", "--model", "/no/model"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "orig_argv", ["python", *words])
    monkeypatch.setattr(thread_waiting, "busy_fraction", lambda: busy)
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(os, "execve", lambda *arguments: begun.append(arguments))
    assert cli.main() == 2  # as if execve had failed: the run goes on
    assert len(begun) == restarts
    if restarts:
        path, arguments, changed = begun[0]
        assert path == sys.executable
        assert arguments == [sys.executable, *words]
        assert changed == {**os.environ, "OMP_WAIT_POLICY": "passive"}
        assert "OMP_WAIT_POLICY=passive" in capsys.readouterr().err
