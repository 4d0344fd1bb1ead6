"""Making the plan in a process of its own, which ends before a weight is read: transformers and
PEFT take 200 MB that the work itself can do without.

    python -m hqqlora.quantize_command.plan_apart <options >plan    (both pickled)
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from typing import Any

from hqqlora.command.checkpoint_folder import DenseCheckpoint, open_checkpoint
from hqqlora.command.errors import RunError
from hqqlora.quantize_command.measure import measure_importance
from hqqlora.quantize_command.options import QuantizeOptions
from hqqlora.quantize_command.plan import Plan, make_plan


def plan_here(options: QuantizeOptions) -> tuple[DenseCheckpoint, Plan]:
    """Reads the headers and decides; with `--importance`, the dense model runs.

    Raises:
        UsageError: see `open_checkpoint`, `make_plan` and `measure_importance`.
    """
    checkpoint = open_checkpoint(options.source)
    plan = make_plan(checkpoint, options)
    if options.importance and not options.dry_run:
        plan = measure_importance(checkpoint, plan, options.dtype)
    return checkpoint, plan


def plan_apart(options: QuantizeOptions) -> tuple[DenseCheckpoint, Plan]:
    """`plan_here`, in another process unless this one has transformers in memory anyway."""
    if "hqqlora.transformers" in sys.modules:
        return plan_here(options)
    done = subprocess.run(
        [sys.executable, "-m", "hqqlora.quantize_command.plan_apart"],
        input=pickle.dumps(options),
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        raise RunError(f"the process that plans ended with exit code {done.returncode}")
    result: Any = pickle.loads(done.stdout)
    if isinstance(result, RunError):
        raise result
    checkpoint, plan = result
    return checkpoint, plan


def _main() -> None:
    # What libraries print must not come between.
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        try:
            result: Any = plan_here(pickle.load(sys.stdin.buffer))
        except RunError as error:
            result = error
        pickle.dump(result, answer)


if __name__ == "__main__":
    _main()
