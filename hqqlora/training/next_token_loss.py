"""Cross entropy of the next token, with the logits of a few hundred tokens at a time."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from hqqlora.chunked_loss import applies_head_alone
from hqqlora.head_cross_entropy import head_cross_entropy
from hqqlora.training.batches import IGNORED


class NextTokenLoss:
    """The loss of a causal language model, computed behind its last hidden states.

    A model's own forward makes all logits [tokens, vocabulary] at once, in the model's dtype
    and again in float32, and keeps them for the backward pass: often the largest tensors of a
    step. Here the output layer and the loss go in chunks (`head_cross_entropy`); sums are
    float32.

    Some models do more with their logits than apply the output layer (scale, cap). Whether this
    one does is tried once, on a few tokens; if so, its own forward is used, and only the loss
    behind its logits is chunked.
    """

    def __init__(self, model: nn.Module) -> None:
        """For `model`, a transformers causal language model."""
        self.model = cast(Any, model)
        self.chunked = applies_head_alone(model)

    @torch.no_grad()
    def sum(
        self, ids: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> float:
        """The summed loss of ids [batch, length] over its batch * (length - 1) predictions;
        with `labels` and `mask` as for `backward`."""
        return float(head_cross_entropy(*self._states(ids, labels, mask), self._head).item())

    def backward(
        self,
        ids: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        predictions: int | None = None,
    ) -> float:
        """The mean loss of ids [batch, length]; adds its gradient to the parameters'.

        With `labels` [batch, length] the mean is that over the whole batch's labels other than
        -100, at least one behind a row's first token; `mask` [batch, length] is 0 at padding.
        With `predictions` the sum of the loss is divided by that many, where these are a part
        of a larger batch.
        """
        states, targets = self._states(ids, labels, mask)
        total = head_cross_entropy(states, targets, self._head)
        loss = total / (predictions or len(targets))
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.item())

    @property
    def _head(self) -> nn.Module:
        """What makes logits of that which `_states` returns."""
        head: nn.Module = self.model.get_output_embeddings()
        return head if self.chunked else nn.Identity()

    def _states(
        self, ids: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What is turned into logits: hidden states (chunked) or the logits themselves, of all
        tokens but each sequence's last, [predictions, width]; and the tokens to predict. With
        labels, only of those that are learned."""
        inputs = (
            {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
        )
        if self.chunked:
            states = self.model.base_model(**inputs, use_cache=False)[0]
        else:
            states = self.model(**inputs, use_cache=False).logits
        if labels is not None:
            learned = labels[:, 1:] != IGNORED
            return states[:, :-1][learned], labels[:, 1:][learned]
        return states[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
