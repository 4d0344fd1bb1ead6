"""Faults while the library writes: processes killed, disks full, folders that are read-only.

    python -m tests.faults --kills 200

kills processes in the middle of all kinds of saves, and prints where each hit and what was
found then: the old files or the new ones. Then it saves again, which must succeed and leave no
temporary files. The exit code is 1 if anything was lost.

A process is forked from one that has torch in memory. It dies of SIGKILL before its n-th change
of the file system; or of SIGXFSZ at a byte, in the middle of writing a file; or of SIGKILL at a
random time.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from fault_writers import Files, Writer, all_writers, files_in, leavings_in

# What changes a file system, as Python's audit hooks call it; and fsync, which has no event.
_CHANGES = {
    "open": "open",
    "os.rename": "rename",
    "os.remove": "remove",
    "os.mkdir": "mkdir",
    "os.rmdir": "rmdir",
    "os.chmod": "chmod",
    "shutil.copyfile": "copy",
}


class Prepared:
    """A writer with its old and new state, and how many changes it makes in how long."""

    def __init__(self, writer: Writer, place: Path) -> None:
        self.writer = writer
        self.place = place
        own = place / "own"
        own.mkdir(parents=True)
        self._old_folder = place / "old"
        self._old_folder.mkdir()
        with contextlib.redirect_stderr(io.StringIO()):
            writer.setup(own)
            writer.write_old(self._old_folder)
        self.old: Files = files_in(self._old_folder)
        folder = self.fresh_folder()
        pipe = os.pipe()
        started = time.perf_counter()
        outcome = in_child(
            lambda: writer.write_new(folder), lambda: count_changes(folder, pipe[1])
        )
        self.seconds = time.perf_counter() - started
        assert outcome == "done", f"{writer.name}: {outcome}"
        os.close(pipe[1])
        with os.fdopen(pipe[0]) as read:
            self.changes = read.read().split()
        self.new: Files = files_in(folder)
        self.largest = max(map(len, self.new.values()))

    def fresh_folder(self) -> Path:
        """A folder with the old state."""
        folder = self.place / "work"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._old_folder, folder)
        return folder


@dataclass(frozen=True)
class Result:
    """What became of one fault. `outcome`: "killed", "done", or the exception; `verdict`: see
    `Writer.verdict`; `leavings`: temporary files there were then; `again`: what is wrong after
    it was saved again, or nothing."""

    outcome: str
    verdict: str
    leavings: int
    again: str


def try_fault(prepared: Prepared, fault: Callable[[Path], None], delay: float | None) -> Result:
    """Saves in a process that has `fault`, or is killed after `delay` seconds; looks; saves
    again."""
    writer = prepared.writer
    folder = prepared.fresh_folder()
    outcome = in_child(lambda: writer.write_new(folder), lambda: fault(folder), delay)
    verdict = writer.verdict(folder, prepared.old, prepared.new)
    leavings = len(leavings_in(folder))
    second = in_child(lambda: writer.write_new(folder), lambda: None)
    again = "" if second == "done" else f"saving again: {second}"
    last = writer.verdict(folder, prepared.old, prepared.new)
    if not again and last != "new":
        again = f"after saving again: {last}"
    if not again and leavings_in(folder) and not writer.leaves_temporaries:
        again = f"left after saving again: {leavings_in(folder)}"
    return Result(outcome, verdict, leavings, again)


def in_child(
    action: Callable[[], None], before: Callable[[], None], delay: float | None = None
) -> str:
    """ "done", "killed", or the exception with which `action` ended in a forked process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            torch.set_num_threads(1)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            before()
            action()
        except BaseException as error:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
            os.write(write, f"{type(error).__name__}: {error}"[:4000].encode())
            os._exit(1)
        os._exit(0)
    os.close(write)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)  # a zombie, if it has ended: harmless
    with os.fdopen(read, "rb") as said:
        problem = said.read().decode("utf-8", "replace")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "killed"
    return problem or "done"


# ---- faults, each to be begun in the child -----------------------------------------------


def count_changes(folder: Path, descriptor: int) -> None:
    """Writes the name of each change to `descriptor`."""
    _before_changes(folder, lambda kind: os.write(descriptor, f"{kind}\n".encode()))


def kill_at_change(number: int) -> Callable[[Path], None]:
    """SIGKILL before the change of this number, from 0."""

    def at(kind: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return _at_change(number, at)


def fail_at_change(number: int, code: int = errno.ENOSPC) -> Callable[[Path], None]:
    """An OSError instead of the change of this number."""

    def at(kind: str) -> None:
        raise OSError(code, os.strerror(code))

    return _at_change(number, at)


def fail_at_every_change(code: int = errno.EROFS) -> Callable[[Path], None]:
    """An OSError instead of each change: a file system that is read-only."""

    def at(kind: str) -> None:
        raise OSError(code, os.strerror(code))

    return lambda folder: _before_changes(folder, at)


def kill_at_byte(number: int) -> Callable[[Path], None]:
    """SIGXFSZ once a file is of so many bytes: in the middle of a write."""

    def fault(folder: Path) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))

    return fault


def no_room_beyond(number: int) -> Callable[[Path], None]:
    """An OSError once a file is of so many bytes."""

    def fault(folder: Path) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, hard))

    return fault


def no_fault(folder: Path) -> None:
    pass


def _at_change(number: int, act: Callable[[str], None]) -> Callable[[Path], None]:
    def fault(folder: Path) -> None:
        left = [number]

        def count(kind: str) -> None:
            left[0] -= 1
            if left[0] == -1:
                act(kind)

        _before_changes(folder, count)

    return fault


def _before_changes(folder: Path, act: Callable[[str], Any]) -> None:
    """Calls `act` before each change in `folder`, for the rest of this process."""
    prefix = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        kind = _CHANGES.get(event)
        if kind is None or not _is_path_in(arguments[0], prefix):
            return
        if kind != "open" or _for_writing(*arguments[1:3]):
            act(kind)

    sys.addaudithook(hook)
    fsync = os.fsync

    def fsync_with_hook(descriptor: int) -> None:
        act("fsync")
        fsync(descriptor)

    os.fsync = fsync_with_hook  # type: ignore[assignment]


def _is_path_in(path: object, prefix: str) -> bool:
    return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(prefix)


def _for_writing(mode: object, flags: object) -> bool:
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


# ---- many kills --------------------------------------------------------------------------


def random_kill(
    prepared: Prepared, generator: random.Random
) -> tuple[str, Callable[[Path], None], float | None]:
    """Where a kill is to hit, the fault, and the delay if it is one of time."""
    kind = generator.choice(("change", "change", "byte", "time"))
    if kind == "change":
        number = generator.randrange(len(prepared.changes))
        return f"before {prepared.changes[number]}", kill_at_change(number), None
    if kind == "byte":
        return "in a write", kill_at_byte(generator.randrange(prepared.largest)), None
    return "at a time", no_fault, generator.uniform(0, prepared.seconds)


def run_kills(
    writers: list[Writer], kills: int, seed: int, place: Path
) -> list[tuple[str, str, Result]]:
    """(writer, where, result) of each kill that was not too late."""
    generator = random.Random(seed)
    prepared = [Prepared(writer, place / str(i)) for i, writer in enumerate(writers)]
    results: list[tuple[str, str, Result]] = []
    turn = 0
    while len(results) < kills:
        target = prepared[turn % len(prepared)]
        turn += 1
        where, fault, delay = random_kill(target, generator)
        result = try_fault(target, fault, delay)
        if result.outcome == "killed":
            results.append((target.writer.name, where, result))
        elif result.outcome != "done" or result.again:  # a save that failed by itself
            raise AssertionError(f"{target.writer.name}: {result}")
        if sys.stderr.isatty():
            print(f"\r{len(results)} of {kills} kills", end="", file=sys.stderr)
    return results


def table(results: list[tuple[str, str, Result]]) -> str:
    """Per writer: kills, where they hit, what was found, and what was lost."""
    lines = [f"{'':<34}{'kills':>6}{'old':>6}{'new':>6}{'some new':>10}{'lost':>6}   where"]
    names = list(dict.fromkeys(name for name, _, _ in results))
    for name in [*names, "together"]:
        own = [(w, r) for n, w, r in results if name in (n, "together")]
        found = Counter("lost" if is_lost(r) else r.verdict for _, r in own)
        places = ", ".join(f"{n} {w}" for w, n in Counter(w for w, _ in own).most_common())
        counts = f"{found['old']:>6}{found['new']:>6}{found['some new']:>10}{found['lost']:>6}"
        lines.append(f"{name:<34}{len(own):>6}{counts}   {places}")
    return "\n".join(lines)


def is_lost(result: Result) -> bool:
    return result.verdict.startswith("LOST") or bool(result.again)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hqqlora-faults-") as place:
        results = run_kills(all_writers(), options.kills, options.seed, Path(place))
    print(table(results))
    left = sum(result.leavings > 0 for _, _, result in results)
    print(f"\n{left} left temporary files; the next save removed all but safetensors' own")
    lost = [(name, where, result) for name, where, result in results if is_lost(result)]
    for name, where, result in lost:
        print(f"LOST: {name}, {where}: {result}")
    print(f"lost: {len(lost)} of {len(results)}")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
