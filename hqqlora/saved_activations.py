"""How much memory the autograd graph keeps for the backward pass, and which layer made it."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a DTensor that is on this rank; any other tensor itself."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def storage_of(tensor: Tensor) -> tuple[Hashable, int]:
    """What names a tensor's memory as long as it lives, and its bytes. Views have the same;
    tensors on the meta device, which have no memory, each their own and the bytes that they
    would take."""
    local = local_tensor(tensor)
    try:
        storage = local.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse, or a subclass without a storage
        return id(tensor), local.nbytes
    place = storage.data_ptr() or storage._cdata
    return (local.device.type, local.device.index, place), storage.nbytes()


class SavedActivations:
    """Watches what the graph saves while `watch` is open.

    A storage counts once, whatever is saved of it and however often, from when it is first
    saved until the graph has let go of all that was saved of it. It belongs to the innermost
    module that was running. Parameters and buffers do not count.

    Left out is what is saved during a backward pass: what checkpointing computes again, a
    block at a time.
    """

    def __init__(self, model: nn.Module) -> None:
        """Of `model`, which says what is a parameter and which module has which name."""
        self.peak = 0
        self._names = {module: name for name, module in model.named_modules()}
        self._own = _storages(model)
        self._running: list[_Run] = []
        self._held: dict[Hashable, _Held] = {}
        self._released: deque[Hashable] = deque()  # its append is atomic, wherever __del__ runs
        self._total = 0
        self._at_peak: dict[Hashable, _Held] | None = {}

    def by_layer(self) -> dict[str, int]:
        """Bytes by module name at the time of `peak`."""
        found: defaultdict[str, int] = defaultdict(int)
        for held in (self._held if self._at_peak is None else self._at_peak).values():
            found[held.layer] += held.size
        return dict(found)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """For one forward and backward pass or several."""
        enter = register_module_forward_pre_hook(self._enter)
        leave = register_module_forward_hook(self._leave, always_call=True)
        try:
            with saved_tensors_hooks(self._pack, _Saved.unpack):
                yield
        finally:
            enter.remove()
            leave.remove()

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        if module in self._names:
            self._running.append(_Run(module, self._names[module]))

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self._running and self._running[-1].module is module:
            self._running.pop()

    def _pack(self, tensor: Tensor) -> _Saved:
        self._settle()
        place, size = storage_of(tensor)
        if torch._C._current_graph_task_id() != -1 or self._is_own(tensor, place):
            return _Saved(tensor, None, None)
        if place in self._held:
            self._held[place].uses += 1
            return _Saved(tensor, place, self._released)
        self._held[place] = _Held(self._running[-1].name if self._running else "", size)
        self._total += size
        if self._total > self.peak:
            self.peak, self._at_peak = self._total, None  # copied before it falls again
        return _Saved(tensor, place, self._released)

    def _settle(self) -> None:
        """Takes off what the graph has let go of."""
        while self._released:
            place = self._released.popleft()
            held = self._held[place]
            held.uses -= 1
            if held.uses == 0:
                if self._at_peak is None:
                    self._at_peak = dict(self._held)
                self._total -= held.size
                del self._held[place]

    def _is_own(self, tensor: Tensor, place: Hashable) -> bool:
        if isinstance(tensor, nn.Parameter) or place in self._own:
            return True
        # FSDP gives the modules that run other parameters than those that they had.
        return bool(self._running) and place in self._running[-1].own()


@dataclass
class _Run:
    """A module in its forward."""

    module: nn.Module
    name: str
    _own: frozenset[Hashable] | None = None

    def own(self) -> frozenset[Hashable]:
        if self._own is None:
            self._own = _storages(self.module)
        return self._own


@dataclass
class _Held:
    """A storage that the graph holds."""

    layer: str
    size: int
    uses: int = 1


class _Saved:
    """What the graph holds instead of a tensor."""

    __slots__ = ("place", "released", "tensor")

    def __init__(
        self, tensor: Tensor, place: Hashable, released: deque[Hashable] | None
    ) -> None:
        self.tensor = tensor
        self.place = place
        self.released = released

    def unpack(self) -> Tensor:
        return self.tensor

    def __del__(self) -> None:
        if self.released is not None:
            self.released.append(self.place)


def _storages(module: nn.Module) -> frozenset[Hashable]:
    """Of its parameters and buffers, those of its children too."""
    tensors = chain(module.parameters(), module.buffers())
    return frozenset(storage_of(tensor)[0] for tensor in tensors)
