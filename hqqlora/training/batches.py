"""What training steps and perplexities take in: windows of a text, or padded rows."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hqqlora.chunked_loss import IGNORED as IGNORED

Row = tuple[list[int], list[int]]
"""A sequence's token ids and its labels, equally many."""


class Batch(NamedTuple):
    """Sequences as `NextTokenLoss` takes them, each tensor int64 [rows, length]. Without labels
    every token is learned; without a mask there is no padding."""

    ids: Tensor
    labels: Tensor | None = None
    mask: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many there are, padding left out."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    @property
    def predictions(self) -> int:
        """How many tokens are learned: none is that a row begins with."""
        if self.labels is None:
            return self.ids[:, 1:].numel()
        return int((self.labels[:, 1:] != IGNORED).sum())


class Examples:
    """Sequences to train on, or held out: windows of a text, or rows of ids and labels."""

    def __init__(self, sequences: Tensor | list[Row]) -> None:
        """Of `sequences`, windows [count, length] of which every token is learned, or rows,
        which are padded where they meet in a batch."""
        self.sequences = sequences

    def __len__(self) -> int:
        """How many sequences there are."""
        return len(self.sequences)

    def take(self, places: Sequence[int]) -> Batch:
        """The sequences at `places` as one batch."""
        if isinstance(self.sequences, Tensor):
            return Batch(self.sequences[list(places)])
        return pad_batch([self.sequences[place] for place in places])

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """The batch of a step (from 0), see `batch_places`."""
        return self.take(batch_places(len(self), step, size, seed))

    def parts(self, step: int, size: int, seed: int, most: int | None) -> list[Batch]:
        """That batch in parts of `most` sequences, all at once if None. Each is padded to its
        own longest."""
        places = batch_places(len(self), step, size, seed)
        most = most or size
        return [self.take(places[at : at + most]) for at in range(0, size, most)]

    def batch_tokens(self, step: int, size: int, seed: int) -> int:
        """How many tokens that batch has, padding left out."""
        if isinstance(self.sequences, Tensor):
            return size * self.sequences.shape[1]
        places = batch_places(len(self), step, size, seed)
        return sum(len(self.sequences[place][0]) for place in places)

    @property
    def tokens(self) -> int:
        """How many there are in all."""
        if isinstance(self.sequences, Tensor):
            return self.sequences.numel()
        return sum(len(ids) for ids, _ in self.sequences)

    @property
    def predictions(self) -> int:
        """How many tokens are learned in all: none is that a sequence begins with."""
        if isinstance(self.sequences, Tensor):
            return self.sequences[:, 1:].numel()
        return sum(len(row) - row.count(IGNORED) for row in (y[1:] for _, y in self.sequences))

    @property
    def highest(self) -> int:
        """The highest token."""
        if isinstance(self.sequences, Tensor):
            return int(self.sequences.max())
        return max(max(ids) for ids, _ in self.sequences)


def pad_batch(rows: Sequence[Row]) -> Batch:
    """`rows` as one batch, filled up on the right to the longest; padding is token 0, which
    every model knows, and neither seen nor learned."""
    longest = max(len(ids) for ids, _ in rows)

    def filled(values: list[list[int]], rest: int) -> Tensor:
        return torch.tensor([v + [rest] * (longest - len(v)) for v in values])

    return Batch(
        filled([ids for ids, _ in rows], 0),
        filled([labels for _, labels in rows], IGNORED),
        filled([[1] * len(ids) for ids, _ in rows], 0),
    )


def batch_places(count: int, step: int, size: int, seed: int) -> list[int]:
    """Which of `count` sequences make the batch of one step (from 0).

    Every epoch goes through all sequences in an order of its own. The order depends on `seed`
    and the epoch alone, so that a resumed run needs no position but the step.
    """
    places = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, count)
        places.append(_epoch_order(count, seed, epoch)[place])
    return places


@functools.lru_cache(maxsize=2)  # a step takes places of one epoch, or of two
def _epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order
