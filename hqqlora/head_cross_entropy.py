"""Cross entropy behind a model's output layer, a few hundred tokens' logits at a time.

    logits = head(states)              [tokens, vocabulary], in the model's dtype
    p      = softmax(logits)           float32
    loss   = sum over tokens of -log p[target]
    dlogits = p - onehot(target), and from it the gradient of states, at once

A model's own forward has all logits in memory, in its dtype and in float32, beside their log
softmax, and again the gradients of all three: often the largest tensors of a step. Here a chunk
of tokens goes forward and backward before the next begins, its softmax is turned into its
gradient in place, and what is kept for the backward pass is the gradient of states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Tokens whose logits exist at a time: 256 x 49,152 float32 are 50 MB. On two cores, in bf16,
# 1,020 tokens, 576 features, milliseconds with 128, 256, 510 and all at a time: 245, 204, 189,
# 187 where freed memory is kept (fewer tokens read the weight too often); 284, 304, 358, 345
# where it is not (fresh pages are cleared first). cross_entropy on all at once: 202 and 460.
_CHUNK = 256


def head_cross_entropy(states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """The sum of the cross entropy of ``head(states)``.

    Args:
        states: [tokens, features], the last hidden states.
        targets: [tokens] int64, each in [0, vocabulary).
        head: turns states [m, features] into logits [m, vocabulary]: a dense or a quantized
            layer, with or without an adapter.

    Returns:
        A scalar, float32 (float64 of float64 logits). Its gradient, which cannot be
        differentiated again, reaches states and those parameters of head that are trained.

    Raises:
        What head raises.
    """
    trained = [p for p in head.parameters() if p.requires_grad]
    if not torch.is_grad_enabled() or not (states.requires_grad or trained):
        return _sum(states, targets, head)
    total: Tensor = _HeadCrossEntropy.apply(states, targets, head, *trained)  # type: ignore[no-untyped-call]
    return total


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, head: nn.Module, *trained: Tensor
    ) -> Tensor:
        ctx.states_wanted = states.requires_grad
        total, gradients = _sum_and_gradients(states, targets, head, trained)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # a float32 scalar, which torch does not round to the other's dtype before it multiplies
        scaled = [saved * gradient for saved in ctx.saved_tensors]
        of_states = scaled.pop(0) if ctx.states_wanted else None
        return (of_states, None, None, *scaled)


def _sum(states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    parts = [
        _losses_and_softmax(head(chunk), target)[0].sum()
        for chunk, target in _chunks(states, targets)
    ]
    return torch.stack(parts).sum() if parts else states.new_zeros((), dtype=torch.float32)


def _sum_and_gradients(
    states: Tensor, targets: Tensor, head: nn.Module, trained: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The loss, the gradient of states if they want one, and those of `trained`."""
    total = states.new_zeros((), dtype=torch.float32)
    of_states = [torch.empty_like(states)] if states.requires_grad else []
    of_trained = [torch.zeros_like(parameter) for parameter in trained]
    done = 0
    for chunk, target in _chunks(states.detach(), targets):
        with torch.enable_grad():
            leaf = chunk.requires_grad_(states.requires_grad)
            logits = head(leaf)
        losses, gradient = _losses_and_softmax(logits.detach(), target)
        total = total + losses.sum()
        gradient.scatter_add_(1, target[:, None], gradient.new_full((len(target), 1), -1))
        wanted = [leaf, *trained] if of_states else list(trained)
        found = list(torch.autograd.grad(logits, wanted, gradient.to(logits.dtype)))
        if of_states:
            of_states[0][done : done + len(chunk)] = found.pop(0)
        for held, new in zip(of_trained, found, strict=True):
            held += new
        done += len(chunk)
    return total, of_states + of_trained


def _losses_and_softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's loss [m] and softmax [m, vocabulary], in float32 (float64 stays).

    The largest logit's softmax is one over the sum of exponentials: its logarithm is exact
    where that of the target's would be log(0).
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    softmax = torch.softmax(logits, dim=-1, dtype=dtype)
    below = logits.amax(-1).to(dtype) - logits.gather(1, targets[:, None])[:, 0]
    return below - softmax.amax(-1).log(), softmax


def _chunks(states: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    if not len(states):
        return []
    return list(zip(torch.split(states, _CHUNK), torch.split(targets, _CHUNK), strict=True))
