"""Mixtures of experts of transformers: quantized, adapted, trained, saved and loaded."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from expert_models import (
    EXPERTS,
    FAMILIES,
    check_same_outputs,
    dense,
    dequantized,
    experts_of,
    quantized,
)
from safetensors.torch import load_file
from tiny_models import assert_same_model, inputs_for
from torch import Tensor, nn

import hqqlora
from hqqlora import BaseQuantizeConfig, HqqConfig, HQQExperts, HQQExpertWeights
from hqqlora.layers_to_quantize import unquantized_parameters

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- quantize_model ---------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_computes_what_the_dequantized_model_computes(family: str) -> None:
    model = quantized(family)
    reference = dequantized(model)
    assert not isinstance(reference.get_submodule(EXPERTS), HQQExperts)
    check_same_outputs(model, reference, inputs_for(model))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 3, 2, 1])
def test_all_bits_and_both_axes(nbits: int, axis: int) -> None:
    model = quantized("mixtral", nbits, axis, num_hidden_layers=1)
    assert experts_of(model).gate_up_proj.nbits == nbits
    check_same_outputs(model, dequantized(model), inputs_for(model))


def test_each_expert_is_quantized_as_a_layer_of_its_own() -> None:
    model = dense("mixtral")
    weight = model.get_submodule(EXPERTS).gate_up_proj.detach().clone()
    config = BaseQuantizeConfig(nbits=4, group_size=32)
    stacked = experts_of(hqqlora.quantize_model(model, config, progress=False)).gate_up_proj
    for e in range(4):
        alone = hqqlora.HQQLinear.from_weights(
            weight[e], None, config, compute_dtype=torch.float32
        )
        for mine, other in zip(stacked.expert(e)[:3], alone.packed[:3], strict=True):
            assert torch.equal(mine, other)
        assert torch.equal(stacked.dequantize()[e], alone.dequantize())


def test_the_router_stays_dense_and_so_does_what_is_skipped() -> None:
    model = dense("qwen2_moe")
    four = BaseQuantizeConfig(nbits=4, group_size=32)
    two = BaseQuantizeConfig(nbits=2, group_size=16)
    config = {"experts.gate_up_proj": two, "*": four}
    hqqlora.quantize_model(model, config, skip_modules=("lm_head", "shared_expert_gate"))
    experts = experts_of(model)
    assert (experts.gate_up_proj.nbits, experts.down_proj.nbits) == (2, 4)
    left = {name for name, _ in unquantized_parameters(model)}
    assert {"model.layers.0.mlp.gate.weight", "lm_head.weight"} <= left
    assert not any("experts" in name for name in left)

    model = dense("qwen2_moe")
    hqqlora.quantize_model(model, four, skip_modules=("lm_head", "experts.down_proj"))
    assert experts_of(model).down_proj.dim() == 3
    assert f"{EXPERTS}.down_proj" in {name for name, _ in unquantized_parameters(model)}
    check_same_outputs(model, dequantized(model), inputs_for(model))

    model = dense("qwen2_moe")
    hqqlora.quantize_model(model, four, skip_modules=("lm_head", "experts"))
    assert not isinstance(model.get_submodule(EXPERTS), HQQExperts)


def test_what_has_no_form_that_is_known_stays_dense_with_a_warning() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)
            self.conv = nn.Conv1d(8, 8, 3)  # 3-D, but no experts
            self.expert_stack = nn.Parameter(torch.randn(4, 32, 32))

    with pytest.warns(UserWarning, match=r"expert_stack \[4, 32, 32\], stay dense") as warned:
        hqqlora.quantize_model(Unknown(), BaseQuantizeConfig(group_size=32), progress=False)
    assert len(warned) == 1


def test_errors_name_the_expert_and_leave_the_weights() -> None:
    model = dense("mixtral")
    weight = model.get_submodule(EXPERTS).down_proj
    with torch.no_grad():
        weight[2, 5, 7] = float("nan")
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.down_proj: expert 2: .*5, 7"):
        hqqlora.quantize_model(model, BaseQuantizeConfig(group_size=32), progress=False)
    with pytest.raises(ValueError, match=r"experts.gate_up_proj: group_size=48 does not"):
        hqqlora.quantize_model(
            dense("mixtral"), {"experts": BaseQuantizeConfig(group_size=48)}, progress=False
        )


def test_copies_moves_and_pickles() -> None:
    model = quantized("gpt_oss", num_hidden_layers=1)
    weights = experts_of(model).gate_up_proj
    assert_same_model(model, copy.deepcopy(model))
    again = pickle.loads(pickle.dumps(experts_of(model)))
    assert torch.equal(again.gate_up_proj.W_q, weights.W_q)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert experts_of(half).gate_up_proj.compute_dtype == torch.bfloat16
    assert experts_of(half).gate_up_proj.W_q.dtype == torch.uint8
    with torch.no_grad():
        assert half(**inputs_for(model)).logits.isfinite().all()
    empty = HQQExpertWeights(4, weights.metadata)
    empty.load_state_dict(weights.state_dict(), strict=True)
    assert torch.equal(empty.dequantize(), weights.dequantize())
    other = hqqlora.HQQExpertWeights.from_weights(
        torch.randn(weights.weight.shape), BaseQuantizeConfig(nbits=2, group_size=16)
    )
    other.load_state_dict(_with_metadata(weights))
    assert torch.equal(other.dequantize(), weights.dequantize())


def _with_metadata(weights: HQQExpertWeights) -> dict[str, Tensor]:
    copied = copy.deepcopy(weights)
    copied.state_dict_metadata = True
    return copied.state_dict()


# ---- routing ----------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_without_rows_and_one_with_all(experts: int, dtype: torch.dtype) -> None:
    """Against float64 products of the dequantized weights, for every expert."""
    model = quantized(
        "mixtral", num_hidden_layers=1, num_local_experts=experts, num_experts_per_tok=1
    )
    hqqlora.add_lora(model, r=4, lora_alpha=8, init_lora_weights=False)
    module = experts_of(model).to(dtype).train()
    for chosen in range(experts):
        x = torch.randn(10, 64).to(dtype).requires_grad_()
        index, share = torch.full((10, 1), chosen), torch.rand(10, 1).to(dtype) + 0.5
        y = module(x, index, share)
        dy = torch.randn_like(y)
        module.zero_grad()
        y.backward(dy)

        exact_x = x.detach().double().requires_grad_()
        factors = []
        rows = exact_x
        for key in ("gate_up_proj", "down_proj"):
            layer = getattr(module, key)
            A, B = (t.detach()[chosen].double().requires_grad_() for t in (
                layer.lora_A, layer.lora_B))  # fmt: skip
            factors += [(layer.lora_A, A), (layer.lora_B, B)]
            W = layer.base_layer.dequantize(torch.float32)[chosen].double()
            rows = rows @ (W + layer.scaling * B @ A).T
            if key == "gate_up_proj":
                gate, up = rows.chunk(2, dim=-1)
                rows = nn.functional.silu(gate) * up
        exact = rows * share.double()
        exact.backward(dy.double())
        # a few roundings to dtype, each of a sum of up to 128 terms, seen against the norm
        bound = 1e-6 if dtype == torch.float32 else 0.02
        for found, want in ((y, exact), (x.grad, exact_x.grad)):
            assert (found.double() - want).norm() <= bound * want.norm()
        for parameter, factor in factors:
            assert (parameter.grad[chosen].double() - factor.grad).norm() <= bound * max(
                1e-3, factor.grad.norm()
            )
            others = [e for e in range(experts) if e != chosen]
            assert not parameter.grad[others].any()


def test_no_token_at_all() -> None:
    module = experts_of(quantized("mixtral"))
    empty = module(torch.zeros(0, 64), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert empty.shape == (0, 64)


def test_compiles_without_a_break() -> None:
    module = experts_of(quantized("mixtral", num_hidden_layers=1))
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x, index = torch.randn(6, 64), torch.tensor([[0, 1], [3, 0], [1, 2]] * 2)
    share = torch.rand(6, 2)
    assert torch.equal(compiled(x, index, share), module(x, index, share))


# ---- adapters ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_learn_as_on_the_dense_model(family: str) -> None:
    """Loss and gradients are those of W + scaling B A in the dequantized model."""
    model = hqqlora.add_lora(quantized(family), r=4, lora_alpha=8, init_lora_weights=False)
    adapted = {
        n: m for n, m in model.named_modules() if isinstance(m, hqqlora.LoRAExpertWeights)
    }
    assert adapted
    plain = quantized(family)
    reference = dequantized(plain)
    inputs = inputs_for(model)
    for name, layer in model.named_modules():
        if isinstance(layer, hqqlora.LoRALinear):
            reference.get_submodule(name).weight.data += layer.delta_weight()
    tracked = {}
    for name, layer in adapted.items():
        owner, _, key = name.rpartition(".")
        experts = reference.get_submodule(owner)
        delta = layer.delta_weight()
        delta = delta.transpose(1, 2) if experts.is_transposed else delta
        parameter = getattr(experts, key)
        parameter.data += delta.detach()
        tracked[name] = parameter.requires_grad_()
    loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
    expected = reference.train()(**inputs, labels=inputs["input_ids"]).loss
    assert abs(loss - expected) <= 2e-5 * expected
    loss.backward()
    expected.backward()
    for name, parameter in tracked.items():
        layer, dW = adapted[name], parameter.grad
        if reference.get_submodule(name.rpartition(".")[0]).is_transposed:
            dW = dW.transpose(1, 2)
        dA = layer.scaling * layer.lora_B.detach().transpose(1, 2) @ dW
        dB = layer.scaling * dW @ layer.lora_A.detach().transpose(1, 2)
        assert (layer.lora_A.grad - dA).norm() <= 1e-4 * dA.norm()
        assert (layer.lora_B.grad - dB).norm() <= 1e-4 * dB.norm()


def test_training_lowers_the_loss() -> None:
    model = hqqlora.add_lora(quantized("mixtral"), r=4, target_modules=r".*experts\..*_proj")
    optimizer = torch.optim.AdamW(hqqlora.lora_parameters(model), lr=1e-2)
    inputs = inputs_for(model)
    losses = []
    for _ in range(6):
        loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


def test_adapters_are_saved_as_pefts_and_loaded(tmp_path: Path) -> None:
    from peft import PeftModel

    model = hqqlora.add_lora(
        quantized("mixtral"), r=4, init_lora_weights=False, rank_pattern={"down_proj": 6}
    )
    inputs = inputs_for(model)
    hqqlora.save_adapter(model, tmp_path)
    mine = hqqlora.load_adapter(quantized("mixtral"), tmp_path).eval()
    assert torch.equal(mine(**inputs).logits, model.eval()(**inputs).logits)
    pefts = PeftModel.from_pretrained(quantized("mixtral"), tmp_path)
    check_same_outputs(pefts, model, inputs)
    on_dense = PeftModel.from_pretrained(dequantized(quantized("mixtral")), tmp_path)
    check_same_outputs(on_dense, model, inputs)
    with pytest.raises(ValueError, match="experts"):
        hqqlora.load_adapter(quantized("qwen3_moe"), tmp_path)


# ---- transformers -----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_bit_for_bit(family: str, tmp_path: Path) -> None:
    """Quantized on load, in memory, saved, loaded: one model."""
    in_memory = quantized(family)
    dense(family).save_pretrained(tmp_path / "dense")
    kind = type(in_memory)
    config = HqqConfig(nbits=4, group_size=32)
    on_load = kind.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert_same_model(in_memory, on_load)
    for name, model in (("memory", in_memory), ("load", on_load)):
        model.save_pretrained(tmp_path / name)
        assert_same_model(on_load, kind.from_pretrained(tmp_path / name))
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("memory", "load")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_hqq_config_skips_and_mixes_by_name(tmp_path: Path) -> None:
    dense("mixtral").save_pretrained(tmp_path / "dense")
    kind = type(dense("mixtral"))
    four, two = {"nbits": 4, "group_size": 32}, {"nbits": 2, "group_size": 16}
    config = HqqConfig(dynamic_config={"self_attn": four, "mlp.experts.gate_up_proj": two})
    model = kind.from_pretrained(tmp_path / "dense", quantization_config=config)
    experts = experts_of(model)
    assert experts.gate_up_proj.nbits == 2
    assert isinstance(experts.down_proj, nn.Parameter)
    model.save_pretrained(tmp_path / "saved")
    assert_same_model(model, kind.from_pretrained(tmp_path / "saved"))
    config = HqqConfig(nbits=4, group_size=32, skip_modules=["lm_head", "experts"])
    model = kind.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert not any(isinstance(m, HQQExpertWeights) for m in model.modules())
