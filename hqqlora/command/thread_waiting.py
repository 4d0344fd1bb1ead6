"""How OpenMP threads wait for each other, where other programs want the processor too."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_SAMPLE = 0.25  # seconds
_BUSY = 0.15  # fraction of our processors


def wait_asleep_if_busy() -> None:
    """Where other programs keep the processors busy, starts this process anew with OpenMP
    threads that sleep when they have to wait; otherwise returns.

    Threads usually spin while they wait. On two idle cores that is fastest (a training step of
    the default model takes 2.1 s; 3.1 s asleep). If another program takes one of the cores,
    they spin through its share of time at each of thousands of barriers (13.7 s; 3.7 s
    asleep). OpenMP reads its settings once, when it is loaded, so the process must begin again.
    Nothing happens if the environment has a setting already.
    """
    if any(name in os.environ for name in _SETTINGS) or not sys.executable:
        return
    if busy_fraction() < _BUSY:
        return
    print(
        "hqqlora: other programs are busy here, so threads sleep while they wait "
        "(OMP_WAIT_POLICY=passive)",
        file=sys.stderr,
        flush=True,
    )
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    with suppress(OSError):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def busy_fraction() -> float:
    """The part of the time, now, in which the processors that this process may use are at
    work for others; 0 where the system does not say (it does in Linux's /proc/stat)."""
    try:
        processors = os.sched_getaffinity(0)
        before = _busy_and_total(Path("/proc/stat").read_text().splitlines(), processors)
        time.sleep(_SAMPLE)
        after = _busy_and_total(Path("/proc/stat").read_text().splitlines(), processors)
    except (OSError, ValueError, AttributeError):
        return 0.0
    return (after[0] - before[0]) / max(1, after[1] - before[1])


def _busy_and_total(lines: Iterable[str], processors: Iterable[int]) -> tuple[int, int]:
    """Clock ticks that `processors` have been busy, and all their ticks, by /proc/stat."""
    wanted = {f"cpu{number}" for number in processors}
    busy = total = 0
    for line in lines:
        name, *fields = line.split()
        if name in wanted:
            ticks = [int(field) for field in fields[:8]]  # the two after these are in user
            total += sum(ticks)
            busy += sum(ticks) - ticks[3] - ticks[4]  # idle, waiting for a disk
    return busy, total
