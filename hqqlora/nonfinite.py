"""Where in a model numbers stop being finite: NaN and infinity spread, and hide their source.

Nothing here runs until something has gone wrong: then the step is taken once more, and watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hqqlora.module_names import unwrapped

_WEIGHTS = ("W_q", "scale", "zero", "bias", "weight")


@dataclass(frozen=True)
class Nonfinite:
    """Where it begins. `str()` of it is half a sentence."""

    layer: str
    """The name of the module, without wrappers; "" is the model itself."""
    kind: str
    """One of "weights", "adapter" (a parameter of the layer is not finite), "activations" (what
    goes in is finite, what comes out is not), "gradients" (likewise backward), "inputs"."""
    detail: str
    """Which tensor, and what is known about it."""

    def __str__(self) -> str:
        """As in an error message."""
        return f"it begins in the {self.kind} of {self.layer or 'the model'}: {self.detail}"


def find_nonfinite(model: nn.Module, inputs: Any) -> Nonfinite | None:
    """Runs `model` once, and finds the first module whose output is not finite though its
    inputs are; if there is none, the first in whose backward a gradient stops being finite.

    The model's parameters, their gradients and torch's CPU generator are afterwards as before,
    and dropout draws what the next forward would draw: to repeat a step exactly, set the
    generator to what it was before the step.

    Args:
        model: in the mode (train, eval) that it is to be run in.
        inputs: a mapping of keyword arguments, a tuple of arguments or one tensor, for the
            model; if its output has a `loss`, as in transformers, backward is run too. Or a
            function without arguments that runs the model, and backward if it is to be watched.

    Returns:
        None if all is finite.
    """
    watch = _Watch(model)
    step = inputs if callable(inputs) else partial(_run, model, inputs)
    with _as_before(model), watch.hooked(), suppress(_FoundError):
        step()
    return watch.found or watch.first_gradient()


class _FoundError(Exception):
    """Ends a forward pass: what follows is not finite either."""


def _run(model: nn.Module, inputs: Any) -> None:
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    else:
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Gradients and random numbers as they were; the gradients empty meanwhile."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


class _Watch:
    """Hooks on modules, and what they have seen."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: Nonfinite | None = None
        # In the order in which backward comes by: module, "output", "input" or a parameter's
        # name, and whether the gradient is finite.
        self._gradients: list[tuple[str, str, bool]] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        for name, module in _callable_modules(self.model):
            before = partial(self._before, name)
            after = partial(self._after, name)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        for parameter, place in _owners(self.model).items():
            if parameter.requires_grad:
                note = self._note(*place)
                handles.append(parameter.register_hook(note))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        # (a mask may be infinite by design)
        for tensor in _tensors((args, {k: v for k, v in kwargs.items() if "mask" not in k})):
            if not _finite(tensor):
                self._stop(name, module, "input", tensor)
            if tensor.requires_grad:
                tensor.register_hook(self._note(name, "input"))  # type: ignore[no-untyped-call]

    def _after(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if not _finite(tensor):
                self._stop(name, module, "output", tensor, _tensors(args))
            if tensor.requires_grad:
                tensor.register_hook(self._note(name, "output"))  # type: ignore[no-untyped-call]

    def _stop(
        self,
        name: str,
        module: nn.Module,
        where: str,
        tensor: Tensor,
        inputs: Sequence[Tensor] = (),
    ) -> None:
        """Inputs of a module that begin to be infinite come from its parent's own forward: all
        modules that ran before gave finite outputs."""
        shown = unwrapped(name)
        bad = _counted(tensor)
        culprit = _bad_parameter(module) if where == "output" else None
        if culprit is not None:
            parameter, value = culprit
            kind = "weights" if parameter.rpartition(".")[2] in _WEIGHTS else "adapter"
            if "lora_" in parameter:
                kind = "adapter"
            self.found = Nonfinite(shown, kind, f"{parameter} has {_counted(value)}")
        elif where == "output":
            detail = f"{bad} in its output{_size_of(inputs)}"
            self.found = Nonfinite(shown, "activations", detail)
        elif name == "":
            self.found = Nonfinite("", "inputs", f"{bad} in what the model is given")
        else:
            parent = shown.rpartition(".")[0]
            detail = f"{bad} in what it computes for {shown.rpartition('.')[2]}"
            self.found = Nonfinite(parent, "activations", detail)
        raise _FoundError

    def _note(self, name: str, what: str) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            self._gradients.append((name, what, _finite(gradient)))

        return note

    def first_gradient(self) -> Nonfinite | None:
        """The first module that turns finite gradients of its outputs into others; of modules
        in each other the innermost."""
        spoiled: set[str] = set()
        found: tuple[str, str] | None = None
        for name, what, finite in self._gradients:
            if finite:
                continue
            if what == "output":
                spoiled.add(name)
            elif name not in spoiled and (found is None or _is_inside(name, found[0])):
                found = (name, what)
        if found is not None:
            of = "its input" if found[1] == "input" else found[1]
            detail = f"that of {of} is not finite, those of its outputs are"
            return Nonfinite(unwrapped(found[0]), "gradients", detail)
        for name, what, finite in self._gradients:
            if not finite:
                detail = f"that of its {what} is not finite as backward arrives there"
                return Nonfinite(unwrapped(name), "gradients", detail)
        return None


def _is_inside(name: str, parent: str) -> bool:
    return name != parent and (parent == "" or name.startswith(parent + "."))


def _callable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules to watch. What is inside of a layer with an adapter is left alone: it is not
    called in a fused product, and a hook there would end the fusion."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            inside.append(f"{name}." if name else "")
            if name == "":
                yield name, module
                return
        yield name, module


def _owners(model: nn.Module) -> dict[nn.Parameter, tuple[str, str]]:
    """For each parameter the innermost module that is watched, and its name there."""
    owners: dict[nn.Parameter, tuple[str, str]] = {}
    for name, module in _callable_modules(model):  # (parents come first)
        for parameter_name, parameter in module.named_parameters():
            owners[parameter] = (name, parameter_name)
    return owners


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of floating-point numbers in nested arguments or outputs."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() and not value.is_meta else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())


def _counted(tensor: Tensor) -> str:
    values = tensor.detach()
    nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
    parts = [f"{nan} NaN"] * (nan > 0) + [f"{infinite} infinite"] * (infinite > 0)
    return f"{' and '.join(parts)} of {values.numel()} elements"


def _size_of(inputs: Sequence[Tensor]) -> str:
    sizes = [float(tensor.detach().abs().max()) for tensor in inputs if tensor.numel()]
    return f", for inputs of at most {max(sizes):.3g}" if sizes else ""


def _bad_parameter(module: nn.Module) -> tuple[str, Tensor] | None:
    for name, parameter in [*module.named_parameters(), *module.named_buffers()]:
        if parameter.is_floating_point() and not _finite(parameter):
            return name, parameter
    return None
