"""A model for a while as it is used, not trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` within; then, whatever happens, training as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
