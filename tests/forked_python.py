"""Python scripts in processes of their own that are forked from one which has imported what
they all need: to import torch, transformers and PEFT takes longer than most of what they do.

As a script, the process that they are forked from: ``python forked_python.py MODULE ...``. Each
line that it reads is a run as JSON; what it answers is that run's exit status.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Seconds that a run may take; then it ends by SIGALRM.
PATIENCE = 600


class ForkedPython:
    """Runs scripts as ``python SCRIPT ARGUMENTS`` would, but that `modules` are imported
    already. On one thread, without a GPU."""

    def __init__(self, *modules: str) -> None:
        one_thread = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._server = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **one_thread},
            text=True,
        )

    def run(
        self, script: Path, arguments: Sequence[str | Path] = (), *, folder: Path
    ) -> tuple[int, str, str]:
        """The exit status, as subprocess has it, and what went to stdout and stderr; they are
        kept in `folder`, which the script starts in."""
        files = [folder / "stdout.txt", folder / "stderr.txt"]
        words = [str(script), *map(str, arguments)]
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps([words, str(folder), *map(str, files)]) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the process to fork from has ended"
        return int(answer), *(file.read_text() for file in files)

    def close(self) -> None:
        """Ends the process to fork from."""
        self._server.communicate()


def next_run() -> list[str] | None:
    """The words of a run in the process forked for it; None in this one, at the end."""
    for line in sys.stdin:
        words, folder, output, errors = json.loads(line)
        process = os.fork()
        if process == 0:
            signal.alarm(PATIENCE)
            os.chdir(folder)
            for number, path in ((0, os.devnull), (1, output), (2, errors)):
                opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                os.dup2(opened, number)
                os.close(opened)
            return list(words)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


if __name__ == "__main__":
    for module in sys.argv[1:]:
        importlib.import_module(module)
    if words := next_run():
        sys.argv = words
        sys.path[0] = os.path.dirname(words[0])
        runpy.run_path(words[0], run_name="__main__")
