"""What goes into each linear layer of a dense model: how much an error in a weight's column
counts.

A layer's output is off by (w' - w) x. Where the errors of a row are independent, the square of
that is expected to be the sum of E[x_k^2] (w'_k - w_k)^2: the columns' mean squares are the
weights of a weighted fit. They differ by factors of ten between the columns of a real model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Of the random tokens: sequences, in one batch, and tokens of each.
_SEQUENCES, _LENGTH = 8, 64


@torch.no_grad()
def input_importance(
    model: nn.Module, inputs: Iterable[Any] | None = None, *, seed: int = 0
) -> dict[str, Tensor]:
    """Runs the dense `model` and returns, for each nn.Linear that takes part, the mean square
    of each of its inputs, for `quantize_model(..., importance=...)`.

    No data are needed: by default the model reads 512 tokens drawn at random from its
    vocabulary, which served SmolLM2 better than text did (docs/quantizer.md).

        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8))
        >>> importance = input_importance(model, [torch.randn(100, 64)])
        >>> {name: list(values.shape) for name, values in importance.items()}
        {'0': [64], '1': [32]}

    The first position of each sequence is left out of inputs [..., sequence, features], if
    there is another: language models park attention there, with inputs unlike all others.

    Args:
        model: runs in eval mode, and is afterwards in the mode it was in.
        inputs: what to run it on: tensors, or mappings of keyword arguments. None: random
            tokens, as `input_ids`, for a model that has transformers' `get_input_embeddings`.
        seed: of the random tokens. torch's own generator is not touched.

    Returns:
        float32 tensors [in_features] on the layers' devices, by the layers' names.

    Raises:
        ValueError: inputs is None and the model has no input embeddings; or an input of a layer
            is not finite, naming the layer.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    batches = _random_tokens(model, seed) if inputs is None else inputs
    with _in_eval_mode(model), _hooked(model, partial(_add_squares, sums, rows)):
        for batch in batches:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    means = {name: total / rows[name] for name, total in sums.items() if rows[name]}
    for name, values in means.items():
        if not values.isfinite().all():
            raise ValueError(f"{name}: what goes in is not finite, or its squares are not")
    return means


def body_importance(model: Any) -> dict[str, Tensor]:
    """`input_importance` of a transformers model by random tokens, but for the output layer,
    whose products are not computed: with a large vocabulary they take more memory than all
    else."""
    body = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is body)
    found = input_importance(body)
    return {f"{prefix}.{name}" if prefix else name: x for name, x in found.items()}


def _random_tokens(model: nn.Module, seed: int) -> list[dict[str, Tensor]]:
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    if weight is None:
        raise ValueError(
            f"{type(model).__name__} has no input embeddings for random tokens: give inputs"
        )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(weight), (_SEQUENCES, _LENGTH), generator=generator)
    return [{"input_ids": ids.to(weight.device)}]


def _add_squares(
    sums: dict[str, Tensor],
    rows: dict[str, int],
    name: str,
    _: nn.Module,
    positional: tuple[Any, ...],
    keywords: dict[str, Any],
) -> None:
    x: Tensor = (positional[0] if positional else keywords["input"]).detach()
    if x.dim() > 2 and x.size(-2) > 1:
        x = x[..., 1:, :]
    x = x.reshape(-1, x.size(-1)).float()
    squares = x.square().sum(0)
    sums[name] = sums[name] + squares if name in sums else squares
    rows[name] = rows.get(name, 0) + len(x)


@contextmanager
def _hooked(model: nn.Module, hook: Any) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(partial(hook, name), with_kwargs=True)
        for name, module in model.named_modules()
        if type(module) is nn.Linear
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
