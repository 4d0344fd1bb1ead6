"""Held-out perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from tqdm import tqdm

from hqqlora.evaluating import evaluating
from hqqlora.training.batches import Examples
from hqqlora.training.next_token_loss import NextTokenLoss


@dataclass(frozen=True)
class Perplexity:
    """``exp(mean loss)`` over the predicted tokens, natural logarithm."""

    value: float
    loss: float
    tokens: int


def measure_perplexity(
    model: nn.Module, loss: NextTokenLoss, examples: Examples, batch: int, label: str
) -> Perplexity:
    """The perplexity of `model` on `examples`, `batch` sequences at a time.

    Sequences do not overlap and are not joined: each learned token but a sequence's first is
    predicted once, from the tokens before it in its sequence.
    """
    total, tokens = 0.0, 0
    with evaluating(model):
        starts = range(0, len(examples), batch)
        for start in tqdm(starts, desc=label, unit="batch", leave=False, mininterval=0.5):
            part = examples.take(range(start, min(start + batch, len(examples))))
            total += loss.sum(*part)
            tokens += part.predictions
    mean = total / tokens
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, mean, tokens)
