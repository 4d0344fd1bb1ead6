"""Timing contenders that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from tqdm import tqdm

from hqqlora.bench.contenders import Contender


@dataclass
class Rounds:
    """Seconds a step of each contender in each round, and the loss of every step it took."""

    seconds: list[dict[str, float]] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Seconds a step."""
        return statistics.median(times[name] for times in self.seconds)

    def ratio(self, name: str, base: str) -> float:
        """The median, over the rounds, of the ratio of both times in the same round: what slows
        down a whole round, such as another program, cancels."""
        return statistics.median(times[name] / times[base] for times in self.seconds)

    def quantile(self, name: str, fraction: float) -> float:
        """Seconds a step, of that place among the sorted rounds."""
        times = sorted(times[name] for times in self.seconds)
        return times[round(fraction * (len(times) - 1))]


def take_turns(
    contenders: Sequence[Contender],
    batch_of: Callable[[int], Tensor],
    rounds: int,
    steps: int,
) -> Rounds:
    """Lets each contender take `steps` steps in each round, after one step that is not timed.

    Every round begins with another contender. All see the same batches in the same order:
    `batch_of` gives that of a step, from 0.
    """
    found = Rounds(losses={contender.name: [] for contender in contenders})
    total = len(contenders) * (1 + rounds * steps)
    with tqdm(desc="steps", total=total, mininterval=0.5, dynamic_ncols=True) as bar:

        def take(contender: Contender, step: int) -> None:
            found.losses[contender.name].append(contender.step(batch_of(step)))
            bar.update()

        for contender in contenders:
            take(contender, 0)  # memory, code and threads warm up, and the optimizer's state
        for i in range(rounds):
            turn = i % len(contenders)
            times: dict[str, float] = {}
            for contender in [*contenders[turn:], *contenders[:turn]]:
                begin = time.perf_counter()
                for step in range(1 + i * steps, 1 + (i + 1) * steps):
                    take(contender, step)
                times[contender.name] = (time.perf_counter() - begin) / steps
            found.seconds.append(times)
    return found
