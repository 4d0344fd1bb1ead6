"""Cross entropy of the next token, with the logits of a few hundred tokens at a time."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqqlora.training.batches import IGNORED

# Tokens whose logits exist at a time: 256 x 49152 float32 logits are 50 MB.
_CHUNK = 256


class NextTokenLoss:
    """The loss of a causal language model, computed behind its last hidden states.

    A model's own forward makes all logits [tokens, vocabulary] at once, in the model's dtype
    and again in float32, and keeps them for the backward pass: often the largest tensors of a
    step. Here each chunk of tokens goes through the output layer, forward and backward, before
    the next; sums are float32.

    Some models do more with their logits than apply the output layer (scale, cap). Whether this
    one does is tried once, on a few tokens; if so, its own forward is used.
    """

    def __init__(self, model: nn.Module) -> None:
        """For `model`, a transformers causal language model."""
        self.model = cast(Any, model)
        self._backbone: Any = getattr(model, "base_model", None)
        self._head: Any = self.model.get_output_embeddings()
        self.chunked = self._chunks_agree()

    def sum(
        self, ids: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> float:
        """The summed loss of ids [batch, length] over its batch * (length - 1) predictions;
        with `labels` and `mask` as for `backward`."""
        total = 0.0
        with torch.no_grad():
            states, targets = self._states(ids, labels, mask)
            for chunk, target in zip(
                torch.split(states, _CHUNK), torch.split(targets, _CHUNK), strict=True
            ):
                total += F.cross_entropy(self._logits(chunk), target, reduction="sum").item()
        return total

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
        leaf = states.detach().requires_grad_(states.requires_grad)
        total, count = 0.0, predictions or len(targets)
        for chunk, target in zip(
            torch.split(leaf, _CHUNK), torch.split(targets, _CHUNK), strict=True
        ):
            loss = F.cross_entropy(self._logits(chunk), target, reduction="sum") / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        if leaf.grad is not None:
            states.backward(leaf.grad)  # type: ignore[no-untyped-call]
        return total

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
            states = self._backbone(**inputs, use_cache=False)[0]
        else:
            states = self.model(**inputs, use_cache=False).logits
        if labels is not None:
            learned = labels[:, 1:] != IGNORED
            return states[:, :-1][learned], labels[:, 1:][learned]
        return states[:, :-1].flatten(0, 1), ids[:, 1:].flatten()

    def _logits(self, states: Tensor) -> Tensor:
        return (self._head(states) if self.chunked else states).float()

    @torch.no_grad()
    def _chunks_agree(self) -> bool:
        if self._backbone is None or self._backbone is self.model or self._head is None:
            return False
        training = self.model.training
        self.model.eval()
        try:
            vocabulary = len(self.model.get_input_embeddings().weight)
            ids = torch.arange(8).remainder(vocabulary)[None]
            whole = self.model(input_ids=ids, use_cache=False).logits
            states = self._backbone(input_ids=ids, use_cache=False)[0]
            parts = self._head(states)
        finally:
            self.model.train(training)
        return whole.shape == parts.shape and torch.allclose(whole, parts, rtol=0.02, atol=0.02)
