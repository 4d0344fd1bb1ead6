"""What a model in training takes of memory, measured layer by layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

from torch import Tensor, nn, optim
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hqqlora.saved_activations import SavedActivations, storage_of

_KEPT_BY_MERGING = "unmerged_"


@dataclass(frozen=True)
class LayerMemory:
    """Bytes, by what they hold. They can be added: ``sum(layers, LayerMemory())``."""

    codes: int = 0
    """Packed weights."""
    scales: int = 0
    """Scales and zeros."""
    dense: int = 0
    """All other frozen or trained weights, biases and buffers."""
    adapters: int = 0
    """LoRA's (or another PEFT method's) parameters."""
    gradients: int = 0
    optimizer: int = 0
    """The optimizer's state."""
    activations: int = 0
    """What the autograd graph keeps for the backward pass."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: LayerMemory) -> LayerMemory:
        """Kind by kind."""
        return LayerMemory(
            *(getattr(self, field.name) + getattr(other, field.name) for field in fields(self))
        )


KINDS = tuple(field.name for field in fields(LayerMemory))


@dataclass(frozen=True)
class MemoryReport:
    """What `memory_report` found, in bytes. ``print(report)`` shows it as a table."""

    layers: Mapping[str, LayerMemory]
    """Every module that holds something of its own, by name; what belongs to none, as "". Sums
    of parts of a model: `of`."""
    measured_step: bool
    """Whether a step was run: otherwise there are no activations."""

    @property
    def all(self) -> LayerMemory:
        """The sums over all layers."""
        return sum(self.layers.values(), LayerMemory())

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.all.total

    def of(self, name: str) -> LayerMemory:
        """The sums over a module and all inside of it, as in ``report.of("model.layers.0")``.

        Raises:
            KeyError: nothing of that name holds anything.
        """
        parts = [
            memory
            for layer, memory in self.layers.items()
            if layer == name or layer.startswith(f"{name}.")
        ]
        if not parts:
            raise KeyError(name)
        return sum(parts, LayerMemory())

    def blocks(self) -> dict[str, LayerMemory]:
        """The layers, with those of a repeated block (``model.layers.0``) summed up."""
        found: dict[str, LayerMemory] = {}
        for name, memory in self.layers.items():
            block = _block_of(name)
            found[block] = found.get(block, LayerMemory()) + memory
        return found

    def __getattr__(self, name: str) -> Any:
        """``report.codes`` and the other kinds: the sums over all layers."""
        if name in KINDS:
            return getattr(self.all, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __str__(self) -> str:
        """A table in MB, block by block."""
        rows = [("MB", *KINDS, "total")]
        for label, memory in _alike(self.blocks()):
            rows.append((label, *_megabytes(memory)))
        rows.append(("total", *_megabytes(self.all)))
        if not self.measured_step:
            at = 1 + KINDS.index("activations")
            rows[1:] = [(*row[:at], "?", *row[at + 1 :]) for row in rows[1:]]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def memory_report(
    model: nn.Module,
    optimizer: optim.Optimizer | None = None,
    step: Callable[[], object] | None = None,
) -> MemoryReport:
    """What `model` takes of memory: its weights, and what training adds to them.

    ::

        def step():
            model(**batch).loss.backward()

        print(hqqlora.memory_report(model, optimizer, step))

    Every storage counts once, and whole. Of a DTensor (FSDP) the part on this rank counts, of
    a tensor on the meta device what it would take.

    Args:
        model: any module. `HQQLinear`, `LoRALinear` and PEFT's layers are known; whatever else
            there is counts as dense.
        optimizer: whose state counts; None: that of those which take a step in `step`.
        step: runs a training step, forward and backward; it is called once, and it may well
            end with the optimizer's step and zero_grad. What autograd saves meanwhile is
            measured where it is the most, and so are gradients. None: no activations, and
            the gradients that there are now.

    Not seen are what kernels need while they run, and what activation checkpointing computes
    again in the backward pass: as much as one block has without it.
    """
    tensors = dict(_parameters_and_buffers(model))
    activations = SavedActivations(model)
    gradients: dict[str, Tensor] = {}
    optimizers = [] if optimizer is None else [optimizer]

    def note_gradients(*_: Any) -> None:
        for name, tensor in tensors.items():
            if tensor.grad is not None:
                gradients[name] = tensor.grad

    def before_optimizer(stepping: Any, *_: Any) -> None:
        note_gradients()
        if optimizer is None and stepping not in optimizers:
            optimizers.append(stepping)

    note_gradients()
    if step is not None:
        with ExitStack() as stack:
            hook = register_optimizer_step_pre_hook(before_optimizer)
            stack.callback(hook.remove)
            stack.enter_context(activations.watch())
            step()
        tensors = dict(_parameters_and_buffers(model))
        note_gradients()

    sums = _Sums()
    for name, tensor in tensors.items():
        sums.add(name, _kind_of(model, name), tensor)
    for name, gradient in gradients.items():
        sums.add(name, "gradients", gradient)
    names = {tensor: name for name, tensor in tensors.items()}
    for known in optimizers:
        for parameter, state in known.state.items():
            for value in state.values():
                if isinstance(value, Tensor):
                    sums.add(names.get(parameter, ""), "optimizer", value)
    for layer, size in activations.by_layer().items():
        sums.add_bytes(layer, "activations", size)
    order = [name for name, _ in model.named_modules() if name in sums.layers]
    layers = {name: LayerMemory(**sums.layers[name]) for name in order}
    return MemoryReport(layers, measured_step=step is not None)


class _Sums:
    """Bytes by layer and kind, each storage once."""

    def __init__(self) -> None:
        self.layers: dict[str, dict[str, int]] = {}
        self._counted: set[Hashable] = set()

    def add(self, name: str, kind: str, tensor: Tensor) -> None:
        """A tensor of the module that has `name`, a parameter's or buffer's."""
        place, size = storage_of(tensor)
        if place not in self._counted:
            self._counted.add(place)
            self.add_bytes(name.rpartition(".")[0], kind, size)

    def add_bytes(self, layer: str, kind: str, size: int) -> None:
        if size:
            of_layer = self.layers.setdefault(layer, {})
            of_layer[kind] = of_layer.get(kind, 0) + size


# ---- what a parameter is -----------------------------------------------------------------


def _parameters_and_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _kind_of(model: nn.Module, name: str) -> str:
    path = name.split(".")
    module = model
    for part in path:
        if part.startswith("lora_") or part in _adapter_names(module):
            return "adapters"
        child = module._modules.get(part)
        if child is None:
            break
        module = child
    own = path[-1].removeprefix(_KEPT_BY_MERGING)
    quantized = "W_q" in module._parameters or path[-1] != own
    if quantized and own == "W_q":
        return "codes"
    return "scales" if quantized and own in ("scale", "zero") else "dense"


def _adapter_names(module: nn.Module) -> set[str]:
    """The attributes of one of PEFT's modules in which its adapters are."""
    names = getattr(module, "adapter_layer_names", ())
    return {name.partition(".")[0] for name in names}


# ---- as a table --------------------------------------------------------------------------


def _block_of(name: str) -> str:
    """The outermost part of a name that ends with a number: a member of a ModuleList."""
    found = re.match(r"(.*?\.\d+)(\.|$)", name)
    return found[1] if found else name


def _alike(blocks: Mapping[str, LayerMemory]) -> Iterator[tuple[str, LayerMemory]]:
    """Neighbouring blocks of the same size in one line, which has the sizes of one of them."""

    def kind(item: tuple[str, LayerMemory]) -> tuple[str, tuple[str, ...]]:
        return re.sub(r"\.\d+$", "", item[0]), _megabytes(item[1])

    for _, members in groupby(blocks.items(), kind):
        run = list(members)
        (first, memory), (last, _) = run[0], run[-1]
        label = first or "(no layer)"
        if len(run) > 1:
            label = f"{first} to {last.rpartition('.')[2]}, each"
        yield label, memory


def _megabytes(memory: LayerMemory) -> tuple[str, ...]:
    sizes = [*(getattr(memory, kind) for kind in KINDS), memory.total]
    return tuple(f"{size / 1e6:,.1f}" if size else "-" for size in sizes)
