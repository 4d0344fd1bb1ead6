"""`hqqlora bench quantize`: how long this machine takes to quantize a large model.

Matrices of Llama-2-70B's shapes, one after another, in bfloat16 as they lie in a file, with
packed codes as the result. Weights are random, as the default solver takes the same steps for
all (its search and its rounds have fixed lengths).
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import NamedTuple

import torch

from hqqlora.bench.table import aligned
from hqqlora.command.errors import UsageError
from hqqlora.command.options import non_negative_integer, number, positive_integer
from hqqlora.config import SUPPORTED_BITS
from hqqlora.ops import Solver


class Shape(NamedTuple):
    """A matrix, and how many of it a decoder layer has."""

    out_features: int
    in_features: int
    copies: int


# q and o; gate and up, down (the same weights, other rows); k and v
LLAMA_70B = (Shape(8192, 8192, 2), Shape(28672, 8192, 3), Shape(1024, 8192, 2))


def seconds_of(shape: Shape, nbits: int, group_size: int, rounds: int) -> float:
    """The median time of `rounds` turns at one matrix."""
    weight = torch.empty(shape.out_features, shape.in_features, dtype=torch.bfloat16)
    weight.normal_(std=0.02)
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        torch.ops.hqqlora.quantize(
            weight, nbits, group_size, 1, torch.bfloat16, int(Solver.DEFAULT)
        )
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option to `parser`."""
    parser.add_argument(
        "--extrapolate",
        type=number(float, 1, 1e15, "a number of weights"),
        default=70e9,
        metavar="WEIGHTS",
        help="multiply out to so many (default: 70e9)",
    )
    parser.add_argument("--bits", type=int, default=4, choices=SUPPORTED_BITS)
    parser.add_argument("--group-size", type=positive_integer, default=64)
    parser.add_argument("--rounds", type=positive_integer, default=2)
    parser.add_argument(
        "--threads", type=non_negative_integer, default=0, help="0: one a core (default)"
    )


def run(options: argparse.Namespace) -> None:
    """Prints the table.

    Raises:
        UsageError: the group size does not divide a row.
    """
    if 8192 % options.group_size:
        raise UsageError(f"--group-size {options.group_size} does not divide rows of 8192")
    if options.threads:
        torch.set_num_threads(options.threads)
    rows, weights, seconds = [], 0, 0.0
    for shape in LLAMA_70B:
        elements = shape.out_features * shape.in_features
        took = seconds_of(shape, options.bits, options.group_size, options.rounds)
        weights += shape.copies * elements
        seconds += shape.copies * took
        rows.append(
            [
                f"{shape.out_features} x {shape.in_features}",
                f"{took:.3f}",
                f"{elements / took / 1e6:.0f}",
            ]
        )
    header = [("bf16 weight", ""), ("time", "s"), ("M weights", "/s")]
    print("\n".join(aligned(list(zip(*header, strict=True)), rows)))
    total = seconds / weights * options.extrapolate
    print(
        f"\n{options.extrapolate:.3g} weights in a decoder's proportions: {total:.0f} s, "
        f"{total / 60:.1f} minutes, {torch.get_num_threads()} threads (multiplied out)"
    )
