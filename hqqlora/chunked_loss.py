"""`chunk_loss`: a causal language model's loss without all its logits in memory.

A model whose loss is chunked is the same model: its modules, parameters and names are what they
were. Its forward is replaced on the instance, and used where it is trained with labels;
everywhere else (generation, evaluation, compilation) the model's own runs.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqqlora.base_model import without_peft
from hqqlora.evaluating import evaluating
from hqqlora.head_cross_entropy import head_cross_entropy
from hqqlora.optional_packages import needing

IGNORED = -100
"""The label of a token that is not learned, as in torch and transformers."""


def chunk_loss(model: nn.Module) -> nn.Module:
    """Lets a causal language model that is trained compute its loss with the logits of 256
    tokens at a time, forward and backward.

    ``model(input_ids=…, labels=…).loss`` and its gradients are then what they were, but for
    rounding, and the output's ``logits`` are None. That saves the memory of all logits (in the
    model's dtype and in float32) and of their gradients, and the time to fill it. For loops and
    transformers' Trainer; TRL's SFTTrainer has such a loss of its own. Nothing of it is saved.

    The model's own forward is used in evaluation (``model.eval()``), under ``torch.no_grad``,
    without labels, under torch.compile, where a mixture's routers add to the loss, for tuples
    (``return_dict=False``), and for some tokens' logits (``logits_to_keep``).

    Args:
        model: a transformers causal language model, or PEFT's around it, dense or quantized;
            changed in place. It is tried on eight tokens.

    Returns:
        model. `unchunk_loss` undoes it.

    Raises:
        ValueError: the model's loss is not the cross entropy of its output layer's logits: it
            scales or caps them, say, or has no output layer.
    """
    causal = without_peft(model)
    if _is_chunked(causal):
        return model
    if not applies_head_alone(causal) or not _loss_is_plain(causal):
        raise ValueError(
            f"{type(causal).__name__}: its loss is not the cross entropy of what its output "
            f"layer makes of the last hidden states, so it cannot be computed in chunks"
        )
    causal.forward = types.MethodType(_chunked_forward(causal), causal)
    return model


def unchunk_loss(model: nn.Module) -> nn.Module:
    """Undoes `chunk_loss` in `model`, and returns it. Raises nothing: a model whose loss is not
    chunked stays as it is."""
    causal = without_peft(model)
    if _is_chunked(causal):
        replaced = causal.forward.replaced
        del causal.forward
        if replaced is not None:
            causal.forward = replaced
    return model


@torch.no_grad()
def applies_head_alone(model: nn.Module) -> bool:
    """Whether the logits of `model`, a transformers causal language model, are what its output
    layer makes of its backbone's last hidden states. Tried on a few tokens: some models do more
    with their logits (scale, cap)."""
    causal = cast(Any, model)
    backbone, head = getattr(causal, "base_model", None), _output_layer(causal)
    if backbone is None or backbone is causal or head is None:
        return False
    ids = _some_tokens(causal)
    with evaluating(causal):
        whole = causal(input_ids=ids, use_cache=False).logits
        parts = head(backbone(input_ids=ids, use_cache=False)[0])
    return whole.shape == parts.shape and torch.allclose(whole, parts, rtol=0.02, atol=0.02)


@torch.no_grad()
def _loss_is_plain(causal: Any) -> bool:
    ids = _some_tokens(causal)
    with evaluating(causal):
        found = causal(input_ids=ids, labels=ids, use_cache=False)
    plain = F.cross_entropy(found.logits[0, :-1].float(), ids[0, 1:].to(found.logits.device))
    return torch.allclose(found.loss.float(), plain, rtol=0.02, atol=0.02)


def _some_tokens(causal: Any) -> Tensor:
    weight = causal.get_input_embeddings().weight
    return torch.arange(8, device=weight.device).remainder(len(weight))[None]


def _output_layer(causal: Any) -> nn.Module | None:
    find = getattr(causal, "get_output_embeddings", None)
    encodes = getattr(getattr(causal, "config", None), "is_encoder_decoder", False)
    return None if find is None or encodes else find()


# ---- the forward -------------------------------------------------------------------------


def _is_chunked(causal: Any) -> bool:
    return hasattr(causal.forward, "replaced")


def _chunked_forward(causal: Any) -> Callable[..., Any]:
    """What becomes the forward of `causal`. It holds on to no instance, so that a copy of the
    model calls its own; `replaced` is what the instance had in the class's place, if anything
    (a hook of accelerate)."""
    own = type(causal).forward
    replaced = causal.__dict__.get("forward")
    signature = inspect.signature(own)

    @functools.wraps(own)  # Trainer looks at a forward's arguments
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        del given[next(iter(signature.parameters))]
        if not _is_served(self, given):
            return own(self, *args, **kwargs) if replaced is None else replaced(*args, **kwargs)
        return _forward_and_loss(self, given)

    forward.replaced = replaced  # type: ignore[attr-defined]
    return forward


def _is_served(causal: Any, given: dict[str, Any]) -> bool:
    if torch.compiler.is_compiling() or not (causal.training and torch.is_grad_enabled()):
        return False
    if given.get("labels") is None and given.get("shift_labels") is None:
        return False
    kept = given.get("logits_to_keep", 0)
    if not isinstance(kept, int) or kept != 0:
        return False
    return _setting(causal, given, "return_dict", True) and not _setting(
        causal, given, "output_router_logits", False
    )


def _setting(causal: Any, given: dict[str, Any], name: str, default: bool) -> bool:
    value = given.get(name)
    return bool(getattr(causal.config, name, default) if value is None else value)


def _forward_and_loss(causal: Any, given: dict[str, Any]) -> Any:
    with needing("chunk_loss"):
        from transformers.modeling_outputs import CausalLMOutputWithPast
    labels, shifted = given.pop("labels", None), given.pop("shift_labels", None)
    items = given.pop("num_items_in_batch", None)
    ignored = given.pop("ignore_index", IGNORED)
    given.pop("logits_to_keep", None)
    found = causal.base_model(**{**given, "use_cache": False})
    states = found[0]
    if shifted is None:
        states, shifted = states[:, :-1], labels[:, 1:]
    targets = shifted.to(states.device)
    learned = targets != ignored
    head = causal.get_output_embeddings()
    total = head_cross_entropy(states[learned], targets[learned], head)
    count = learned.sum() if items is None else items
    return CausalLMOutputWithPast(
        loss=total / (count.to(total.device) if isinstance(count, Tensor) else count),
        hidden_states=found.hidden_states,
        attentions=found.attentions,
    )
