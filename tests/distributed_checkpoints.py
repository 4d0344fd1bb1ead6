"""Checks for four processes: torch.distributed.checkpoint between four, two and one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_training import ADAPTERS, everyone, quantized, sharded, trainable, whole
from peft_models import token_ids
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hqqlora import HQQLinear
from hqqlora.distributed import shard_model

MODELS = (("own", 3, 1), ("peft", 4, 0))


def adapted(
    adapters: str, bits: int, axis: int, encoded: bool = True, metadata: bool = False
) -> nn.Module:
    """One layer, which writes tensors only, as a transformers model's do. (Each of hqq's
    sixteen values is an entry for torch.distributed.checkpoint to plan, which takes long:
    `formats_of_the_state` writes them.)"""
    torch.manual_seed(0)
    model = ADAPTERS[adapters](quantized(bits, axis, num_hidden_layers=1))
    for layer in model.modules():
        if isinstance(layer, HQQLinear):
            layer.encoded_state_dict, layer.state_dict_metadata = encoded, metadata
    return model


def pair() -> DeviceMesh:
    """Two of the four processes, this one among them."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("pairs", "pair"))["pair"]


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model).values(), lr=1e-2)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 2) -> list[float]:
    """The same batch for every process, so that their number changes nothing but sums."""
    losses = []
    for step in range(count):
        tokens = token_ids(2, 8, seed=step)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def other_model(kind: tuple[Any, ...]) -> nn.Module:
    """Of the same shape, with other numbers everywhere."""
    model = adapted(*kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.ones_like(parameter))
    return model


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p).clone() for name, p in model.named_parameters()}


def assert_same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def load_all(
    path: Path, kind: tuple[str, int, int], mesh: DeviceMesh | None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer from a checkpoint, on the ranks of `mesh`, or on this one alone."""
    model = other_model(kind)
    if mesh is not None:
        sharded(model, mesh)
    optimizer = optimizer_for(model)
    state = state_of(model, optimizer)
    if mesh is None:
        dcp.load(state, checkpoint_id=path, no_dist=True)
    else:
        dcp.load(state, checkpoint_id=path, process_group=mesh.get_group())
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    return model, optimizer


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{i}.{key}": whole(value).clone()
        for i, state in enumerate(optimizer.state.values())
        for key, value in state.items()
    }


def four_to_two_and_one(folder: Path) -> None:
    for kind in MODELS:
        path = folder / f"four-{kind}"
        model = sharded(adapted(*kind), everyone())
        optimizer = optimizer_for(model)
        steps(model, optimizer)
        state = state_of(model, optimizer)
        if kind[1] == 3:  # planes in memory, and hqq's words in what is saved
            key = next(
                name for name in state["model"] if name.endswith("q_proj.base_layer.W_q")
            )
            assert model.get_parameter(key).dtype == torch.uint8
            alone = adapted(*kind).state_dict()[key]
            assert alone.dtype == torch.int32
            assert torch.equal(whole(state["model"][key]), alone)
        dcp.save(state, checkpoint_id=path)
        wanted, wanted_moments = parameters(model), moments(optimizer)
        expected = torch.tensor(steps(model, optimizer))
        for mesh in (pair(), None):
            loaded, loaded_optimizer = load_all(path, kind, mesh)
            assert_same_tensors(parameters(loaded), wanted)
            assert_same_tensors(moments(loaded_optimizer), wanted_moments)
            torch.testing.assert_close(torch.tensor(steps(loaded, loaded_optimizer)), expected)


def one_and_two_to_four(folder: Path) -> None:
    for kind in MODELS[:1]:
        alone = adapted(*kind)
        optimizer = optimizer_for(alone)
        steps(alone, optimizer)
        wanted, wanted_moments = parameters(alone), moments(optimizer)
        if dist.get_rank() == 0:
            state = state_of(alone, optimizer)
            dcp.save(state, checkpoint_id=folder / f"one-{kind}", no_dist=True)
        dist.barrier()
        loaded, loaded_optimizer = load_all(folder / f"one-{kind}", kind, everyone())
        assert_same_tensors(parameters(loaded), wanted)
        assert_same_tensors(moments(loaded_optimizer), wanted_moments)

        two, two_optimizer = load_all(folder / f"one-{kind}", kind, mesh := pair())
        path = folder / f"two-{kind}-{dist.get_rank() // 2}"
        dcp.save(
            state_of(two, two_optimizer), checkpoint_id=path, process_group=mesh.get_group()
        )
        dist.barrier()
        loaded, loaded_optimizer = load_all(folder / f"two-{kind}-0", kind, everyone())
        assert_same_tensors(parameters(loaded), wanted)
        assert_same_tensors(moments(loaded_optimizer), wanted_moments)


def asynchronous(folder: Path) -> None:
    kind = MODELS[0]
    model = sharded(adapted(*kind), everyone())
    optimizer = optimizer_for(model)
    steps(model, optimizer)
    wanted, wanted_moments = parameters(model), moments(optimizer)
    group = dist.new_group(backend="gloo")
    saving = dcp.async_save(
        state_of(model, optimizer), checkpoint_id=folder / "async", process_group=group
    )
    steps(model, optimizer)  # what is saved is from before
    saving.result()
    dist.barrier()
    loaded, loaded_optimizer = load_all(folder / "async", kind, None)
    assert_same_tensors(parameters(loaded), wanted)
    assert_same_tensors(moments(loaded_optimizer), wanted_moments)


def adapters_alone(folder: Path) -> None:
    only = StateDictOptions(ignore_frozen_params=True)
    for kind in MODELS:
        path = folder / f"adapters-{kind}"
        model = shard_model(adapted(*kind), mesh=everyone())
        steps(model, optimizer_for(model))
        state = get_model_state_dict(model, options=only)
        assert len(state) == len(trainable(model))
        dcp.save(state, checkpoint_id=path)

        loaded = sharded(adapted(*kind), mesh := pair())
        state = get_model_state_dict(loaded, options=only)
        dcp.load(state, checkpoint_id=path, process_group=mesh.get_group())
        set_model_state_dict(
            loaded, state, options=StateDictOptions(ignore_frozen_params=True, strict=False)
        )
        assert_same_tensors(parameters(loaded), parameters(model))


def formats_of_the_state(folder: Path) -> None:
    """hqq's metadata as tensors, or as plain values. (The others leave it to the model.)"""
    for encoded in (True, False):
        kind = (*MODELS[0], encoded, True)
        path = folder / f"format-{encoded}"
        model = sharded(adapted(*kind), everyone())
        state = get_model_state_dict(model)
        assert any(key.endswith(".nbits") for key in state)
        dcp.save(state, checkpoint_id=path)
        loaded = sharded(other_model(kind), mesh := pair())
        state = get_model_state_dict(loaded)
        dcp.load(state, checkpoint_id=path, process_group=mesh.get_group())
        set_model_state_dict(loaded, state)
        assert_same_tensors(parameters(loaded), parameters(model))


IN_FOUR: dict[str, Callable[[Path], None]] = {
    "checkpoint-of-four-in-two-and-one": four_to_two_and_one,
    "checkpoint-of-one-and-two-in-four": one_and_two_to_four,
    "checkpoint-asynchronous": asynchronous,
    "checkpoint-of-adapters-alone": adapters_alone,
    "checkpoint-formats-of-the-state": formats_of_the_state,
}
