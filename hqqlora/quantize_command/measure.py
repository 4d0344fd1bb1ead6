"""What goes into each layer of a dense checkpoint that may be larger than memory.

accelerate leaves the weights of the layers in their files, and reads each when its turn comes:
in memory are the embeddings, what else is not quantized, and one layer.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hqqlora.command.checkpoint_folder import DenseCheckpoint
from hqqlora.command.errors import UsageError, explaining
from hqqlora.command.model_source import quiet_transformers
from hqqlora.command.packages import require
from hqqlora.experts import is_experts
from hqqlora.importance import body_importance, input_importance
from hqqlora.quantize_command.plan import Plan, model_class_of


def measure_importance(checkpoint: DenseCheckpoint, plan: Plan, dtype: str) -> Plan:
    """The plan, with the importance of the columns of every linear layer that 512 random tokens
    reach (see `hqqlora.input_importance`). `dtype`: of `--dtype`.

    Raises:
        UsageError: accelerate is missing; transformers cannot load the model; or it cannot
            read random tokens, or what goes into a layer is not finite.
    """
    require("accelerate")
    model_class, config = model_class_of(checkpoint, dtype)
    layers = {step.module for step in plan.layers if step.module}
    with tempfile.TemporaryDirectory(prefix="hqqlora-") as offloaded:
        # transformers shows a progress bar, and says what is on disk
        silence = contextlib.redirect_stderr(io.StringIO())
        quiet_transformers()
        with explaining(f"cannot load the model of {checkpoint.folder}"), silence:
            model = model_class.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=config.dtype,
                device_map=_places(model_class, config, layers),
                offload_folder=offloaded,
                local_files_only=True,
                trust_remote_code=False,
            )
        try:
            found = _measure(model.eval(), layers)
        except ValueError as error:
            raise UsageError(f"--importance: {error}") from error
        # (Hooks hold what they have read until the model goes.)
        del model
    steps = (replace(step, importance=found.get(step.module)) for step in plan.steps)
    return replace(plan, steps=tuple(steps))


def _measure(model: Any, layers: set[str]) -> dict[str, Tensor]:
    """By the layers' names; with the output layer if it is one of `layers`."""
    head = model.get_output_embeddings()
    in_layers = any(module is head and name in layers for name, module in model.named_modules())
    return input_importance(model) if in_layers else body_importance(model)


def _places(model_class: Any, config: Any, layers: set[str]) -> dict[str, str] | None:
    """A device map: `layers`, experts and the output layer on disk, the rest in memory; None:
    all in memory, for a model that has weights beside all its modules."""
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=config.dtype)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied_weights = {*tied, *tied.values()}
    head = model.get_output_embeddings()
    on_disk = {
        module
        for name, module in model.named_modules()
        if name in layers
        or is_experts(module)
        or (module is head and f"{name}.weight" not in tied_weights)
    }
    places: dict[str, str] = {}

    def walk(name: str, module: nn.Module) -> None:
        if on_disk.isdisjoint(module.modules()):
            places[name] = "cpu"
        elif module in on_disk or any(True for _ in module.parameters(recurse=False)):
            places[name] = "disk"
        else:
            for child, of_child in module.named_children():
                walk(f"{name}.{child}" if name else child, of_child)

    walk("", model)
    return None if "" in places else places
