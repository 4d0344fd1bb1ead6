"""Layers that are called with the same x compute their ``x A^T`` in one product.

q, k and v of an attention, gate and up of an MLP. `share_projections` tells such layers of
each other and changes nothing else: no module, parameter or name is another, so that saving,
merging, disabling and switching adapters are what they are without it.

The layer of a group that is called first with an x computes what all of them need of it; the
others, if called with that very tensor, take theirs. Whatever is not so (another tensor, one
that was changed in between, an adapter that is off) leaves a layer to its own product.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from hqqlora.autograd.inputs import transforms_active
from hqqlora.autograd.shared_input import Part, first_of_shared, other_of_shared
from hqqlora.ops.adapter_checks import MAX_RANK

# Names of layers side by side in a module that are called with the same x: of most decoders,
# BERT and ViT, T5, DistilBERT, and of LLaMA as it was first published.
SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
)


# Since this version of torch, `_stamp` can be traced. Before, compiled layers do not share.
_STAMPS_ARE_TRACED = TorchVersion(torch.__version__) >= "2.13"


class SharesInput:
    """What a layer with an adapter has to have to be of a group."""

    shared_projection: SharedProjection | None = None

    def shared_part(self, x: Tensor) -> Part | None:
        """The layer as it would be applied to x; None where it is to compute for itself."""
        raise NotImplementedError


def share_projections(
    model: nn.Module, names: Sequence[Sequence[str]] = SHARED_INPUTS
) -> nn.Module:
    """Lets layers with adapters that take the same input share the products with their A, in
    forward (``x A^T``) and backward (dA, and the adapters' part of dx).

    Off unless called, once, after `add_lora` or PEFT's ``get_peft_model``. Results differ from
    those without it by rounding alone. A layer computes for itself wherever
    something stands against sharing: dropout in training (each layer has a mask of its own),
    DoRA, several active adapters, one that is merged or disabled, ``torch.func``, inference
    mode, tensor parallelism, an input that is not the same tensor, or was changed in place. A
    layer that is seen to be called with another tensor than the rest (the q of a cross
    attention) leaves its group.

    Args:
        model: with adapters, changed in place.
        names: of layers, in one module, that share an input.

    Returns:
        model. `unshare_projections` undoes it; nothing of it is ever saved.

    Raises:
        ValueError: model has no two such layers.
    """
    groups = [
        SharedProjection(members)
        for parent in model.modules()
        for together in names
        if len(members := _members(parent, together)) > 1
    ]
    if not groups:
        raise ValueError(
            f"{type(model).__name__} has no two layers with adapters that share an input: no "
            f"module has two of "
            f"{', or of '.join(', '.join(together) for together in names)}"
        )
    for group in groups:
        for member in group.members:
            member.shared_projection = group
    return model


def unshare_projections(model: nn.Module) -> nn.Module:
    """Undoes `share_projections` in `model`, and returns it. Raises nothing: a model that does
    not share stays as it is."""
    for layer in model.modules():
        if isinstance(layer, SharesInput):
            layer.shared_projection = None
    _pending.clear()
    return model


def _members(parent: nn.Module, names: Sequence[str]) -> list[Any]:
    layers = [parent._modules.get(name) for name in names]
    found: list[Any] = [layer for layer in layers if isinstance(layer, SharesInput)]
    return [layer for layer in found if layer.in_features == found[0].in_features]


class SharedProjection:
    """Layers that share an input."""

    def __init__(self, members: Sequence[Any]) -> None:
        """Does not tell the members."""
        self.members = list(members)

    def leave(self, layer: Any) -> None:
        """The layer computes for itself from now on; a last one too."""
        layer.shared_projection = None
        self.members = [member for member in self.members if member is not layer]
        if len(self.members) == 1:
            self.leave(self.members[0])

    def output(self, layer: Any, x: Tensor) -> Tensor | None:
        """y of one of the members; None if it is to compute for itself."""
        if type(x) is not Tensor or _hides_changes(x) or transforms_active():
            return None
        part = _plain_part(layer, x)
        if part is None:
            return None
        xa = _pending.take(self, layer, x, part.A)
        if xa is not None:
            return other_of_shared(x, part, xa)
        if _pending.serves(self, x):
            return None  # the others are served: two of a group do not compute for them
        others, As = self._others(layer, x, part.A)
        if not others:
            return None
        y, xas = first_of_shared(x, part, As)
        _pending.put(self, layer, x, others, As, xas)
        return y

    def _others(self, layer: Any, x: Tensor, A: Tensor) -> tuple[list[Any], list[Tensor]]:
        """The members whose x A^T can be computed along with that of `layer`, and their A."""
        others, As = [], []
        rank, known = A.shape[0], False
        for member in self.members:
            if member is layer:
                known = True
                continue
            part = _plain_part(member, x)
            if part is None or part.A.device != x.device or rank + part.A.shape[0] > MAX_RANK:
                continue
            others.append(member)
            As.append(part.A)
            rank += part.A.shape[0]
        return (others, As) if known else ([], [])  # a replica of a member is none


def _hides_changes(x: Tensor) -> bool:
    """Whether it cannot be known that x was changed in place."""
    if torch.compiler.is_compiling():
        return not _STAMPS_ARE_TRACED
    return x.is_inference()


def _stamp(tensor: Tensor) -> int:
    """What is another number after the tensor has been changed in place.

    torch.compile cannot compare versions; it compares the addresses of what it traces, and
    stops tracing (an error with ``fullgraph=True``) where one was written to in between.
    """
    return tensor.data_ptr() if torch.compiler.is_compiling() else tensor._version


def _plain_part(layer: Any, x: Tensor) -> Part | None:
    """`shared_part`, unless a factor is no plain tensor but, say, one that is sharded."""
    part: Part | None = layer.shared_part(x)
    if part is None or not {type(part.A), type(part.B)} <= {nn.Parameter, Tensor}:
        return None
    return part


class _Waiting(NamedTuple):
    """What a member has not asked for yet."""

    member: Any
    A: Tensor
    stamp: int
    xa: Tensor


class _Pending(threading.local):
    """The xa of this thread that have been computed and not asked for. There are those of one
    group at most: what a forward that broke off has left is gone with the next group's."""

    group: SharedProjection | None = None
    first: Any = None
    x: Callable[[], Tensor | None] | None = None
    state: Any = None
    waiting: tuple[_Waiting, ...] = ()

    def put(
        self,
        group: SharedProjection,
        first: Any,
        x: Tensor,
        others: Sequence[Any],
        As: Sequence[Tensor],
        xas: Sequence[Tensor],
    ) -> None:
        """`first` has computed `xas` for `others`."""
        self.group, self.first = group, first
        self.x, self.state = weakref.ref(x), _state(x)
        self.waiting = tuple(
            _Waiting(member, A, _stamp(A), xa)
            for member, A, xa in zip(others, As, xas, strict=True)
        )

    def take(self, group: SharedProjection, layer: Any, x: Tensor, A: Tensor) -> Tensor | None:
        """The layer's xa, if it is that of this x and this A."""
        if self.group is not group or self.x is None:
            return None
        mine = [entry for entry in self.waiting if entry.member is layer]
        if not mine:
            return None
        known = self.x()
        if known is not x:
            first = self.first
            self.clear()
            if known is not None and not torch.compiler.is_compiling():
                group.leave(first)  # as the q of a cross attention
            return None
        self.waiting = tuple(entry for entry in self.waiting if entry.member is not layer)
        fits = self.state == _state(x) and mine[0].A is A and mine[0].stamp == _stamp(A)
        if not self.waiting:
            self.clear()
        return mine[0].xa if fits else None

    def serves(self, group: SharedProjection, x: Tensor) -> bool:
        """Whether members wait for what has been computed of this x."""
        return (
            self.group is group
            and self.x is not None
            and self.x() is x
            and self.state == _state(x)
        )

    def clear(self) -> None:
        """Nobody waits any more."""
        self.group = self.first = self.x = self.state = None
        self.waiting = ()


def _state(x: Tensor) -> tuple[Any, ...]:
    """What must be the same when the members are called."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return _stamp(x), torch.is_grad_enabled(), autocast


_pending = _Pending()
