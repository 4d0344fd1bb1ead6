"""Timing contenders that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

# A contender's work in round i; it may use another copy of its data each round. What it returns
# is what it computed, which check.py compares.
Contender = Callable[[int], object]
# A contender of a second a round gets few rounds: torch's fp16 product of 2048 tokens is one.
SLOW = 2.0
# The seconds of one contender's work in round i.
Measure = Callable[[Contender, int], float]


def wall_clock(contender: Contender, i: int) -> float:
    begin = time.perf_counter()
    contender(i)
    return time.perf_counter() - begin


@dataclass
class Times:
    """Seconds of each contender that ran in each round."""

    rounds: list[dict[str, float]]

    def of(self, name: str) -> list[float]:
        return [times[name] for times in self.rounds if name in times]

    def median(self, name: str) -> float:
        return statistics.median(self.of(name))

    def ratio(self, slower: str, faster: str) -> float:
        """The median over the rounds of slower / faster: what slows a whole round cancels."""
        return statistics.median(
            times[slower] / times[faster]
            for times in self.rounds
            if slower in times and faster in times
        )

    def summary(self) -> dict[str, dict[str, float]]:
        """20, 50 and 80 % quantiles and the number of rounds, for the JSON output."""
        result = {}
        for name in self.rounds[0]:
            seconds = sorted(self.of(name))
            last = len(seconds) - 1
            result[name] = {
                f"q{percent}": seconds[round(last * percent / 100)] for percent in (20, 50, 80)
            }
            result[name]["rounds"] = len(seconds)
        return result


def take_turns(
    contenders: dict[str, Contender],
    seconds: float,
    at_least: int = 3,
    at_most: int = 200,
    measure: Measure = wall_clock,
) -> Times:
    """Run rounds of all contenders until `seconds` are over.

    Each gets `at_least` rounds. A contender that has used more than half of the time by itself
    then sits out, so that a slow one does not cost the others their repetitions; one that has
    used SLOW seconds more than all of it sits out from then on.
    """
    names = list(contenders)
    for i, name in enumerate(names):
        contenders[name](i)  # warm up: code, allocator, threads
    spent = dict.fromkeys(names, 0.0)
    rounds: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(rounds) < at_most:
        over = time.perf_counter() - start > seconds
        if over and len(rounds) >= at_least:
            break
        turn = len(rounds) % len(names)  # nobody is always first
        times = {}
        for name in names[turn:] + names[:turn]:
            if spent[name] > (seconds / 2 if len(rounds) >= at_least else seconds + SLOW):
                continue
            times[name] = measure(contenders[name], len(rounds))
            spent[name] += times[name]
        rounds.append(times)
    return Times(rounds)
