"""What four processes check about a tensor-parallel language model; see
tensor_parallel_layers.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft_models import dense_twin, fill_adapters, relative_error, tiny_llama, token_ids
from safetensors.torch import load_file
from tensor_parallel_layers import (
    COLUMN,
    ROW,
    assert_same_state,
    meshes,
    on_all_ranks_the_same,
    trained,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import PrepareModuleInput, parallelize_module

import hqqlora
from hqqlora import BaseQuantizeConfig, HQQLinear
from hqqlora.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from hqqlora.distributed import full_state_dict

PLAN = {
    **{f"self_attn.{name}_proj": COLUMN for name in "qkv"},
    "self_attn.o_proj": ROW,
    "mlp.gate_proj": COLUMN,
    "mlp.up_proj": COLUMN,
    "mlp.down_proj": ROW,
}


def llama(
    adapters: str, dtype: torch.dtype = torch.float32, axis: int = 1, layers: int = 1
) -> Any:
    """A quantized Llama with "own", "peft", "biased" or "dora" adapters; the same on every
    rank."""
    model = tiny_llama(
        dtype, num_key_value_heads=4, intermediate_size=128, num_hidden_layers=layers
    )
    config = BaseQuantizeConfig(nbits=4, group_size=16, axis=axis)
    hqqlora.quantize_model(model, config, progress=False)
    torch.manual_seed(1)
    if adapters == "own":
        return hqqlora.add_lora(model, r=4, init_lora_weights=False)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    config.use_dora = adapters == "dora"
    config.lora_bias = adapters == "biased"
    return fill_adapters(get_peft_model(model, config))


def cut(model: Any, mesh: DeviceMesh, plan: dict[str, Any] = PLAN) -> Any:
    prefix = "base_model.model.model.layers.*." if hasattr(model, "peft_config") else None
    prefix = prefix or "model.layers.*."
    styles = {prefix + name: style() for name, style in plan.items()}
    return parallelize_module(model, mesh, styles)


def loss_of(model: Any) -> Tensor:
    ids = token_ids()
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def gradients(model: Any) -> dict[str, Tensor]:
    loss_of(model).backward()
    found = {name: p.grad for name, p in trained(model)}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


def assert_as_exact(found: Tensor, unsharded: Tensor, exact: Tensor, mesh: DeviceMesh) -> None:
    """As near to float64 as the unsharded model is, in norm: the same products rounded in
    another order. Their errors are alike, not equal: hence a factor; and one rounding a rank
    for the sums over ranks."""
    u = torch.finfo(unsharded.dtype).eps / 2
    limit = 4 * relative_error(unsharded, exact) + mesh.size() * u
    assert relative_error(found, exact) <= limit


def a_llama_with_peft(folder: Path) -> None:
    whole = llama("peft")
    exact = dense_twin(whole, torch.float64)
    exact_loss, exact_gradients = loss_of(exact), gradients(exact)
    whole_loss, whole_gradients = loss_of(whole), gradients(whole)
    for mesh in meshes():
        model = cut(llama("peft"), mesh)
        assert_as_exact(loss_of(model), whole_loss, exact_loss, mesh)
        found = gradients(model)
        assert found.keys() == exact_gradients.keys()
        for name, gradient in found.items():
            assert_as_exact(gradient, whole_gradients[name], exact_gradients[name], mesh)
        for _, parameter in trained(model):
            if parameter.placements == (Replicate(),):
                on_all_ranks_the_same(parameter.grad.to_local(), mesh)


def adapters_in_peft_of_other_kinds(folder: Path) -> None:
    """With a bias behind B; DoRA, column-wise; and several at a time."""
    from peft import LoraConfig

    mesh = meshes()[1]
    with pytest.raises(ValueError, match=r"'default' is no plain LoRA .* row-wise"):
        cut(llama("dora"), mesh, {"mlp.down_proj": ROW})
    biased = (llama("biased"), cut(llama("biased"), mesh))
    whole_y = COLUMN(output_layouts=Replicate())
    rows = {f"base_model.model.model.layers.*.{n}": whole_y for n in PLAN}
    dora = (llama("dora"), parallelize_module(llama("dora"), mesh, rows))
    for whole, model in (biased, dora):
        assert relative_error(loss_of(model), loss_of(whole)) < 1e-6
        wanted = gradients(whole)
        for name, gradient in gradients(model).items():
            assert relative_error(gradient, wanted[name]) < 1e-4, name

    def with_two(model: Any) -> Any:
        torch.manual_seed(3)
        model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
        fill_adapters(model, seed=4)
        model.base_model.set_adapter(["default", "second"])
        return model

    whole, model = with_two(llama("peft")), cut(with_two(llama("peft")), mesh)
    assert relative_error(loss_of(model), loss_of(whole)) < 1e-6
    with whole.disable_adapter(), model.disable_adapter():
        assert relative_error(loss_of(model), loss_of(whole)) < 1e-6
    with pytest.raises(RuntimeError, match="given another adapter"):
        model.add_adapter("third", LoraConfig(r=2, target_modules="all-linear"))


def training_steps(folder: Path) -> None:
    """Three of AdamW's with clipped gradients, and activations computed again: the losses are
    the unsharded ones, and what every rank holds whole stays the same on all."""

    def losses(model: Any) -> list[float]:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        parameters = [p for _, p in trained(model)]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        seen = []
        for _ in range(3):
            loss = loss_of(model)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        return seen

    for axis, mesh in ((1, meshes()[0]), (0, meshes()[1])):
        expected = losses(llama("own", axis=axis))
        model = cut(llama("own", axis=axis), mesh)
        assert losses(model) == pytest.approx(expected, rel=1e-5)
        assert expected[-1] < expected[0]
        for _, parameter in trained(model):
            assert isinstance(parameter, DTensor)
            if parameter.placements == (Replicate(),):
                on_all_ranks_the_same(parameter.to_local(), mesh)


def sixteen_bits(folder: Path) -> None:
    """Parts of sums are rounded to bfloat16 before they are added: no further from float64
    than a small multiple of what the unsharded model is."""
    mesh = meshes()[0]
    whole, model = llama("own", torch.bfloat16), cut(llama("own", torch.bfloat16), mesh)
    exact = loss_of(llama("own", torch.float32))
    ids = token_ids()
    found, wanted = (m(input_ids=ids).logits.float() for m in (model, whole))
    true = llama("own").forward(input_ids=ids).logits
    assert relative_error(found, true) <= 4 * relative_error(wanted, true)
    assert loss_of(model).item() == pytest.approx(exact.item(), rel=2e-2)


def one_all_reduce_a_layer(folder: Path) -> None:
    """Forward: y of the row-wise layers, base and adapter in one. Backward: dx and dA of the
    column-wise layers, dB of the row-wise ones. With torch's PrepareModuleInput around them,
    dx of q, k and v together, and of gate and up."""
    layers, columns, rows = 2, 5, 2
    for prepared in (False, True):
        model = cut(llama("own", layers=layers), meshes()[0])
        dx = columns * layers - 3  # (embeddings are frozen: no dx below the first layer)
        if prepared:
            dx = 2 * layers - 1
            share = {"hidden_states": Replicate()}
            attention = PrepareModuleInput(
                input_kwarg_layouts=share, desired_input_kwarg_layouts=share
            )
            mlp = PrepareModuleInput(
                input_layouts=Replicate(), desired_input_layouts=Replicate()
            )
            for layer in model.model.layers:
                parallelize_module(layer, meshes()[0], {"self_attn": attention, "mlp": mlp})
        with CommDebugMode() as seen:
            loss = loss_of(model)
        assert seen.get_total_counts() == rows * layers
        with CommDebugMode() as seen:
            loss.backward()
        assert seen.get_total_counts() == dx + (columns + rows) * layers
    wanted = gradients(llama("own", layers=layers))
    for name, parameter in trained(model):
        assert relative_error(parameter.grad.full_tensor(), wanted[name]) < 1e-4, name


def saving(folder: Path) -> None:
    mesh = meshes()[0]
    for adapters, axis in (("own", 1), ("own", 0), ("peft", 1)):
        whole = llama(adapters, axis=axis)
        model = cut(llama(adapters, axis=axis), mesh)
        assert_same_state(full_state_dict(model), whole.state_dict())
        on_cpu = full_state_dict(model, cpu_offload=True)
        if dist.get_rank() == 0:
            assert_same_state(on_cpu, whole.state_dict())
        else:
            assert on_cpu == {}
    if dist.get_rank() == 0:
        from peft import get_peft_model_state_dict

        found = get_peft_model_state_dict(model, state_dict=on_cpu)
        assert_same_state(found, get_peft_model_state_dict(whole))
    # as floats on the whole layer; the parts are integers, a row of which may hold no float
    floats = HQQLinear(
        nn.Linear(64, 24),
        BaseQuantizeConfig(nbits=4, group_size=16, view_as_float=True),
        compute_dtype=torch.float16,
    )
    parallel = copy.deepcopy(floats)
    parallelize_module(parallel, mesh, COLUMN())
    saved = full_state_dict(parallel)
    assert saved["W_q"].dtype == torch.float16
    assert_same_state(saved, floats.state_dict())


def adapter_files(folder: Path) -> None:
    """save_adapter on all ranks: the file of the unsharded model; loaded into either."""
    mesh = meshes()[0]
    whole, model = llama("own"), cut(llama("own"), mesh)
    hqqlora.save_adapter(model, folder / "parallel")
    if dist.get_rank() == 0:
        hqqlora.save_adapter(whole, folder / "whole")
    dist.barrier()
    found, wanted = (load_file(folder / f / WEIGHTS_FILE) for f in ("parallel", "whole"))
    assert_same_state(found, wanted)
    configs = [(folder / f / CONFIG_FILE).read_text() for f in ("parallel", "whole")]
    assert configs[0] == configs[1]
    other = cut(llama("own"), mesh)
    with torch.no_grad():
        for _, parameter in trained(other):
            parameter.zero_()
    hqqlora.load_adapter(other, folder / "parallel")
    for (name, parameter), (_, expected) in zip(trained(other), trained(whole), strict=True):
        assert torch.equal(parameter.full_tensor(), expected), name
    hqqlora.load_adapter(whole, folder / "parallel")
    assert relative_error(loss_of(other), loss_of(whole)) < 1e-6


def dense_layers_too(folder: Path) -> None:
    """One plan for a model whose output layer stays dense."""
    mesh = meshes()[1]
    whole = llama("own")
    model = cut(llama("own"), mesh)
    parallelize_module(model, mesh, {"lm_head": COLUMN(output_layouts=Replicate())})
    assert isinstance(model.lm_head.weight, DTensor)
    assert relative_error(loss_of(model), loss_of(whole)) < 1e-6


def with_fsdp2(folder: Path) -> None:
    """Two by two: each pair cuts the layers, FSDP2 what is left over the pairs."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    whole = llama("own")
    model = cut(llama("own"), mesh["tensor"])
    for block in model.model.layers:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    assert relative_error(loss_of(model), loss_of(whole)) < 1e-6
    wanted = gradients(whole)
    for name, gradient in gradients(model).items():
        assert relative_error(gradient, wanted[name]) < 1e-4, name
    assert_same_state(full_state_dict(model), whole.state_dict())


IN_FOUR: dict[str, Callable[[Path], None]] = {
    check.__name__: check
    for check in (
        a_llama_with_peft,
        adapters_in_peft_of_other_kinds,
        training_steps,
        sixteen_bits,
        one_all_reduce_a_layer,
        saving,
        adapter_files,
        dense_layers_too,
        with_fsdp2,
    )
}
