"""Held-out perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hqqlora.training.next_token_loss import NextTokenLoss


@dataclass(frozen=True)
class Perplexity:
    """``exp(mean loss)`` over the predicted tokens, natural logarithm."""

    value: float
    loss: float
    tokens: int


def measure_perplexity(
    model: nn.Module, loss: NextTokenLoss, windows: Tensor, batch: int, label: str
) -> Perplexity:
    """The perplexity of `model` on windows [count, length], `batch` windows at a time.

    Windows do not overlap and are not joined: each token but a window's first is predicted
    once, from the tokens before it in its window.
    """
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        parts = torch.split(windows, batch)
        for ids in tqdm(parts, desc=label, unit="batch", leave=False, mininterval=0.5):
            total += loss.sum(ids)
            tokens += ids[:, 1:].numel()
    finally:
        model.train(training)
    mean = total / tokens
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, mean, tokens)
