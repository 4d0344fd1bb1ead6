"""The training loop: batches in, losses out, a checkpoint now and then."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hqqlora.command.errors import DivergedError, StopRequestedError
from hqqlora.nonfinite import find_nonfinite
from hqqlora.training.batches import Batch, Examples
from hqqlora.training.checkpoint import Progress
from hqqlora.training.next_token_loss import NextTokenLoss
from hqqlora.training.options import TrainOptions


def make_optimizer(
    parameters: list[nn.Parameter], options: TrainOptions
) -> torch.optim.Optimizer:
    """AdamW on the adapter's parameters; nothing else has optimizer state."""
    return torch.optim.AdamW(
        parameters, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
    )


def recompute_activations(model: nn.Module) -> None:
    """Lets each decoder layer of a transformers model be computed again in the backward pass,
    instead of keeping what it computed.

    Raises:
        ValueError: the model does not support it.
    """
    arguments = {"use_reentrant": False}
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs=arguments)
    else:  # its name in older versions
        enable = model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs=arguments)


def learning_rate(step: int, options: TrainOptions) -> float:
    """The rate of a step (from 0): up in a line for `warmup` steps, then down to 0, which the
    step after the last would have."""
    warmup = min(options.warmup, options.steps)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    rest = (options.steps - step) / max(1, options.steps - warmup)
    if options.schedule == "cosine":
        rest = 0.5 * (1 - math.cos(math.pi * rest))
    return options.learning_rate * rest


def train(
    model: nn.Module,
    loss: NextTokenLoss,
    examples: Examples,
    optimizer: torch.optim.Optimizer,
    options: TrainOptions,
    progress: Progress,
    save: Callable[[], None],
    measure: Callable[[], None],
) -> None:
    """Takes the steps that `progress` lacks, and records each in it.

    Args:
        model: with adapters; only parameters that require a gradient are trained.
        examples: the sequences to learn from.
        save: writes a checkpoint of the state between two steps.
        measure: measures the held-out loss between two steps, and records it.

    Raises:
        DivergedError: a loss or gradient is not finite.
        StopRequestedError: the run was asked to end; a checkpoint has been saved.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    bar = tqdm(
        desc="training",
        unit="step",
        total=options.steps,
        initial=progress.step,
        mininterval=0.5,
        dynamic_ncols=True,
    )
    with bar, _requests_to_stop() as stop:
        while progress.step < options.steps:
            tokens = examples.batch_tokens(progress.step, options.batch, options.seed)
            _take_step(loss, examples, optimizer, options, progress, parameters)
            speed = tokens / progress.seconds[-1]
            bar.set_postfix_str(f"loss {progress.losses[-1]:.3f}, {speed:,.0f} tokens/s", False)
            bar.update()
            last = progress.step == options.steps  # after which its caller measures and saves
            if _is_due(progress.step, options.eval_every) and not last:
                measure()
            if stop or (_is_due(progress.step, options.checkpoint_every) and not last):
                save()
            if stop:
                raise StopRequestedError(
                    f"stopped after step {progress.step} of {options.steps}", stop[0]
                )
    model.eval()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _take_step(
    loss: NextTokenLoss,
    examples: Examples,
    optimizer: torch.optim.Optimizer,
    options: TrainOptions,
    progress: Progress,
    parameters: list[nn.Parameter],
) -> None:
    start = time.perf_counter()
    step = progress.step
    rate = learning_rate(step, options)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    parts = examples.parts(step, options.batch, options.seed, options.micro_batch)
    random_state = torch.get_rng_state()
    value = _add_gradients(loss, parts)
    norm = nn.utils.clip_grad_norm_(parameters, options.clip or math.inf).item()
    if not (math.isfinite(value) and math.isfinite(norm)):
        place = _where_it_begins(loss, parts, random_state)
        raise DivergedError(
            f"step {step + 1}: the loss is {value:g} and the gradient's norm {norm:g}; {place}"
            "try a lower --learning-rate"
        )
    optimizer.step()
    progress.losses.append(value)
    progress.rates.append(rate)
    progress.norms.append(norm)
    progress.seconds.append(time.perf_counter() - start)


def _add_gradients(loss: NextTokenLoss, parts: Sequence[Batch]) -> float:
    """Adds the gradient of the mean loss over all parts to the parameters'; that loss."""
    predictions = sum(part.predictions for part in parts)
    return sum(loss.backward(*part, predictions=predictions) for part in parts)


def _where_it_begins(loss: NextTokenLoss, parts: Sequence[Batch], random_state: Tensor) -> str:
    """Takes the step again, with the masks it had, to find the layer; a clause, or nothing."""

    def again() -> None:
        torch.set_rng_state(random_state)
        _add_gradients(loss, parts)

    place = find_nonfinite(loss.model, again)
    return "" if place is None else f"{place}; "


@contextmanager
def _requests_to_stop() -> Iterator[list[int]]:
    """Lends a list that receives the first SIGINT or SIGTERM: the step under way is finished
    first. A second one has its usual effect at once."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()

    def restore() -> None:
        while previous:
            number, handler = previous.popitem()
            signal.signal(number, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread, which alone may: do without
        previous.clear()
    try:
        yield received
    finally:
        restore()
