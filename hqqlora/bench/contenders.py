"""Those that are compared: how each is made from the same dense model, and its step."""

from __future__ import annotations

import contextlib
import io
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hqqlora
from hqqlora.command.errors import RunError, UsageError, explaining
from hqqlora.importance import body_importance
from hqqlora.optional_packages import absence, is_installed

# hqq's and this library's format alike.
NBITS, GROUP_SIZE, AXIS = 4, 64, 1
# Constant, without warm-up: B starts at zero. alpha is twice the rank.
LEARNING_RATE = 1e-3
SEED = 0


@dataclass
class Contender:
    """A causal language model, and what trains it: nothing if `optimizer` is None."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    quantize_seconds: float | None
    compiled: Callable[..., Any] | None = None
    """What a step calls in the model's place: `model` under torch.compile."""

    def step(self, ids: Tensor) -> float:
        """One step on ids [batch, length]: forward, backward, AdamW. Returns the loss.

        The model's forward computes the loss, as it does for transformers' Trainer.
        """
        forward = self.model if self.compiled is None else self.compiled
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    @torch.no_grad()
    def loss(self, windows: Tensor, batch: int) -> float:
        """The mean loss of windows [count, length], `batch` at a time."""
        self.model.eval()
        total = 0.0
        for ids in torch.split(windows, batch):
            found = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            total += float(found.item()) * len(ids)
        self.model.train()
        return total / len(windows)


Quantize = Callable[[nn.Module, Sequence[str]], None]
Adapt = Callable[[nn.Module, Sequence[str], int], nn.Module]


class Recipe(NamedTuple):
    """How a contender is made: what happens to the linear layers, and who adapts them."""

    meaning: str
    packages: tuple[str, ...]
    """Those that it needs besides torch and transformers."""
    quantize: Quantize | None
    """None: the layers stay dense."""
    adapt: Adapt | None
    """None: nothing is trained."""
    fused: bool
    """Whether each layer has to run this library's fused operation; else none may."""
    chunked: bool = False
    """Whether its loss is chunked; else it is the model's own."""
    compiled: bool = False
    """Whether its steps go through torch.compile, as one graph. That takes minutes at first:
    such a contender takes part where it is asked for."""


def make_contender(name: str, dense: nn.Module, rank: int) -> Contender:
    """Turns `dense` into a contender. Its adapters start with the same numbers in all of them.

    Raises:
        RunError: it is not what it should be, so that its figures would mislead: a layer has
            no adapter, or does not run the operations that the contender stands for.
    """
    recipe = CONTENDERS[name]
    layers = linear_layers(dense)
    dense.requires_grad_(False)
    quantize_seconds = None
    if recipe.quantize is not None:
        begin = time.perf_counter()
        with explaining(f"{name}: cannot quantize", RunError):
            recipe.quantize(dense, layers)
        quantize_seconds = time.perf_counter() - begin
    model, optimizer = dense, None
    if recipe.adapt is None:
        pass_gradients(model)
    else:
        with explaining(f"{name}: cannot add the adapter", RunError):
            model = recipe.adapt(dense, layers, rank)
        optimizer = _start_training(name, model, len(layers))
    check_operations(name, model, {"lora_linear": len(layers)} if recipe.fused else {})
    if recipe.chunked:
        with explaining(f"{name}: cannot chunk the loss", RunError):
            hqqlora.chunk_loss(model)
    model.train()
    compiled = torch.compile(model, fullgraph=True) if recipe.compiled else None
    return Contender(name, model, optimizer, quantize_seconds, compiled)


def _start_training(name: str, model: nn.Module, layers: int) -> torch.optim.Optimizer:
    adapted = start_adapters(model)
    if adapted != layers:
        raise RunError(f"{name}: {adapted} of {layers} linear layers have an adapter")
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def linear_layers(model: nn.Module) -> list[str]:
    """The names of all linear layers but the model's output layer.

    Raises:
        RunError: there is none.
    """
    head = _output_layer(model)
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != head]
    if not names:
        raise RunError(f"{type(model).__name__} has no linear layer to quantize")
    return names


def start_adapters(model: nn.Module) -> int:
    """Gives each trained A the numbers that its place in the model decides (uniform, as PEFT
    draws them), and each B zeros. Returns how many A there are."""
    generator = torch.Generator().manual_seed(SEED)
    count = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if "lora_A" in name:
                bound = 1 / math.sqrt(parameter.shape[1])
                parameter.uniform_(-bound, bound, generator=generator)
                count += 1
            else:
                parameter.zero_()
    return count


# ---- what happens to the linear layers ---------------------------------------------------


def quantize_with_hqqlora(model: nn.Module, layers: Sequence[str]) -> None:
    """This library's layers as `hqqlora train` makes them: fitted to what random tokens send
    through them."""
    head = _output_layer(model)
    hqqlora.quantize_model(
        model,
        hqqlora.BaseQuantizeConfig(nbits=NBITS, group_size=GROUP_SIZE, axis=AXIS),
        skip_modules=() if head is None else (head,),
        importance=body_importance(model),
        progress=False,
    )


def quantize_with_hqq(model: nn.Module, layers: Sequence[str]) -> None:
    """hqq's layers, by hqq's solver, with hqq's default backend."""
    with contextlib.redirect_stdout(io.StringIO()):  # hqq prints what it misses
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    config = BaseQuantizeConfig(nbits=NBITS, group_size=GROUP_SIZE, axis=AXIS)
    for name in layers:
        dense: Any = model.get_submodule(name)
        quantized = HQQLinear(
            dense, config, compute_dtype=dense.weight.dtype, device=str(dense.weight.device)
        )
        model.set_submodule(name, quantized)


# ---- who adapts them ---------------------------------------------------------------------


def adapt_with_peft(model: nn.Module, layers: Sequence[str], rank: int) -> nn.Module:
    """PEFT's own way, whatever layers it finds. They are named, as its "all-linear" does not
    see hqq's."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=list(layers),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names that transformers has changed
        adapted: nn.Module = get_peft_model(model, config)
    return adapted


def adapt_with_hqqlora(model: nn.Module, layers: Sequence[str], rank: int) -> nn.Module:
    """This library's own LoRALinear."""
    return hqqlora.add_lora(model, r=rank, lora_alpha=2 * rank, target_modules=list(layers))


def pass_gradients(model: nn.Module) -> None:
    """No adapter: gradients flow back to the embeddings' output, and train nothing."""
    transformers_model: Any = model
    transformers_model.enable_input_require_grads()


CONTENDERS = {
    "hqqlora+peft": Recipe(
        "hqqlora's quantize_model with importance, then PEFT's get_peft_model",
        ("peft",),
        quantize_with_hqqlora,
        adapt_with_peft,
        fused=True,
    ),
    "hqqlora+peft-chunked": Recipe(
        "hqqlora+peft, and its chunk_loss",
        ("peft",),
        quantize_with_hqqlora,
        adapt_with_peft,
        fused=True,
        chunked=True,
    ),
    "hqqlora": Recipe(
        "hqqlora's quantize_model with importance, then its add_lora",
        (),
        quantize_with_hqqlora,
        adapt_with_hqqlora,
        fused=True,
    ),
    "hqq+peft": Recipe(
        "hqq's HQQLinear under PEFT's layer for it",
        ("hqq", "peft"),
        quantize_with_hqq,
        adapt_with_peft,
        fused=False,
    ),
    "dense+peft": Recipe(
        "the dense layers under PEFT's LoRA",
        ("peft",),
        None,
        adapt_with_peft,
        fused=False,
    ),
    "dense": Recipe(
        "the floor: gradients through the frozen dense model, nothing trained",
        (),
        None,
        None,
        fused=False,
    ),
    "hqqlora+peft-compiled": Recipe(
        "hqqlora+peft under torch.compile",
        ("peft",),
        quantize_with_hqqlora,
        adapt_with_peft,
        fused=True,
        compiled=True,
    ),
    "hqqlora-compiled": Recipe(
        "hqqlora under torch.compile",
        (),
        quantize_with_hqqlora,
        adapt_with_hqqlora,
        fused=True,
        compiled=True,
    ),
}


def choose_contenders(asked: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The names of those that take part, and why others do not. Without any `asked` for, that
    is all that are not compiled; but hqq is a rival that one may do without.

    Raises:
        UsageError: another package is not installed, or one that was asked for needs; there is
            no C++ compiler for one that is to be compiled.
    """
    chosen, left_out = [], {}
    for name in asked or [name for name, who in CONTENDERS.items() if not who.compiled]:
        if CONTENDERS[name].compiled:
            _check_compiler(name)
        missing = [p for p in CONTENDERS[name].packages if not is_installed(p)]
        if not missing:
            chosen.append(name)
            continue
        package = missing[0]
        reason = absence(package)
        if asked or package != "hqq":
            raise UsageError(f"{name}: {reason}")
        left_out[name] = reason
    return chosen, left_out


def _check_compiler(name: str) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second to import

    with explaining(f"{name}: torch.compile needs a C++ compiler", UsageError):
        get_cpp_compiler()


# ---- whether it is what it says ----------------------------------------------------------


class _CountOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the calls of this library's operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "hqqlora":
            self.calls[name.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def check_operations(name: str, model: nn.Module, expected: Mapping[str, int]) -> None:
    """Runs the model on two tokens and counts the calls of this library's operators.

    Raises:
        RunError: there were others than `expected`: those of a layer of ours that does not run
            the operator it stands for, or any at all of a rival.
    """
    with _CountOperations() as counted, torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    if counted.calls != expected:
        raise RunError(
            f"{name}: not measured, as it is not what it is called: its forward made the calls "
            f"{dict(counted.calls)} of hqqlora's operators, instead of {dict(expected)}"
        )


def _output_layer(model: nn.Module) -> str | None:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return next((name for name, m in model.named_modules() if m is head), None)
