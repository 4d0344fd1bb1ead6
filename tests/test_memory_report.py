"""hqqlora.memory_report: what it counts, measured against sizes known beforehand; and the
tables of docs/memory.md, made by arithmetic that is checked against it."""

import dataclasses
from pathlib import Path

import pytest
import torch
from peft_models import tiny_llama, tiny_quantized, token_ids
from torch import nn

import hqqlora
from hqqlora import memory_estimate
from hqqlora.memory import KINDS, LayerMemory
from hqqlora.memory_estimate import LLAMA_3, LlamaShape, TrainingPlan

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {"hidden_size": 128, "intermediate_size": 192, "attention_bias": False}
RANK = 4


def adapted(kind, dtype=torch.float32, **config):
    """A quantized tiny Llama with adapters of this library or PEFT's, and AdamW."""
    model = tiny_quantized(dtype, **{**SHAPE, **config})
    if kind == "own":
        hqqlora.add_lora(model, r=RANK)
    else:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    return model.train(), torch.optim.AdamW(trained)


def step_of(model, optimizer=None, **options):
    ids = token_ids(**options)

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


# ---- against arithmetic ----------------------------------------------------------------


def rest(memory, **others):
    return dataclasses.replace(memory, activations=0, **others)


@pytest.mark.parametrize("kind", ["own", "peft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_step_takes_what_arithmetic_says(kind, dtype, tied):
    model, optimizer = adapted(kind, dtype, tie_word_embeddings=tied)
    plan = TrainingPlan(group_size=32, rank=RANK, dtype_bytes=dtype.itemsize)
    shape = LlamaShape.from_config(model.config)
    report = hqqlora.memory_report(model, step=step_of(model, optimizer))
    prefix = "" if kind == "own" else "base_model.model."
    for i in range(shape.blocks):
        assert rest(report.of(f"{prefix}model.layers.{i}")) == plan.block(shape)
    rotary = report.of(f"{prefix}model.rotary_emb").dense
    assert rest(report.all, dense=report.dense - rotary) == plan.model(shape)


def test_a_dense_model_has_no_codes():
    model = tiny_llama(**SHAPE)
    report = hqqlora.memory_report(model)
    parameters = LlamaShape.from_config(model.config).parameters()
    assert parameters == sum(p.numel() for p in model.parameters())
    assert report.all == LayerMemory(dense=4 * parameters + report.of("model.rotary_emb").dense)


@pytest.mark.parametrize(("name", "billions"), [("8B", 8.03), ("70B", 70.55), ("405B", 405.85)])
def test_llama_3_has_as_many_parameters_as_its_authors_say(name, billions):
    assert LLAMA_3[name].parameters() / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_every_format_takes_what_arithmetic_says(nbits, axis):
    quant = hqqlora.BaseQuantizeConfig(nbits=nbits, group_size=32, axis=axis)
    model = tiny_quantized(quant=quant, **SHAPE)
    plan = TrainingPlan(nbits=nbits, group_size=32, axis=axis, dtype_bytes=4)
    expected = plan.block(LlamaShape.from_config(model.config))
    found = hqqlora.memory_report(model).of("model.layers.1")
    assert (found.codes, found.scales) == (expected.codes, expected.scales)


def test_the_largest_shard_is_counted():
    """FSDP2 cuts the first dimension; 6 rows over 4 GPUs are 2, 2, 2 and none."""
    assert TrainingPlan(gpus=4)._bytes((6, 10), 2) == 40


def test_checkpointing_keeps_the_inputs_of_the_blocks():
    model, _ = adapted("own")
    shape = LlamaShape.from_config(model.config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    report = hqqlora.memory_report(model, step=step_of(model, batch=2, length=12))
    plan = TrainingPlan(dtype_bytes=4)
    # (the first block also holds what all of them get: the rotary embedding's cos and sin)
    assert report.of("model.layers.1").activations == plan.block_input(shape, 2 * 12)


def test_the_tables_in_the_docs_are_those_of_the_arithmetic():
    page = (Path(__file__).parent.parent / "docs" / "memory.md").read_text()
    for table in memory_estimate.markdown_tables():
        assert table in page


# ---- activations -----------------------------------------------------------------------


class Block(nn.Module):
    """Saves x [M,K] for the weight's gradient, and the sigmoid's result [M,N]."""

    def __init__(self, K, N):
        super().__init__()
        self.linear = nn.Linear(K, N)

    def forward(self, x):
        return self.linear(x).sigmoid()


def test_activations_belong_to_the_layer_that_saved_them():
    model = nn.Sequential(Block(16, 8), Block(8, 4))
    x = torch.randn(5, 16)
    report = hqqlora.memory_report(model, step=lambda: model(x).sum().backward())
    found = {name: memory.activations for name, memory in report.layers.items()}
    # the first block's result is the second linear layer's input: one storage, counted once
    assert found == {"0": 5 * 8 * 4, "0.linear": 5 * 16 * 4, "1": 5 * 4 * 4, "1.linear": 0}
    assert report.activations == sum(found.values())


def test_the_peak_counts_and_not_the_sum_of_what_was_saved():
    """Two backward passes, one after the other, hold half of what two forwards hold."""
    model = Block(16, 8)
    x = torch.randn(5, 16)

    def one():
        model(x).sum().backward()

    def two():
        one()
        one()

    def together():
        (model(x).sum() + model(x + 1).sum()).backward()

    alone = hqqlora.memory_report(model, step=one).activations
    assert alone == 5 * (16 + 8) * 4
    assert hqqlora.memory_report(model, step=two).activations == alone
    assert hqqlora.memory_report(model, step=together).activations == 2 * alone


def test_views_and_parameters_saved_by_reference_do_not_count():
    weight = nn.Parameter(torch.randn(4, 16))
    x = torch.randn(4, 16, requires_grad=True)

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight
            self.register_buffer("scale", torch.randn(4, 16))

        def forward(self, x):
            flat = x.view(-1)
            y = flat * flat[:].view(-1) * self.weight.view(-1)  # x twice, the weight's view
            return y.view(4, 16) * self.scale.view(4, 16)

    model = Views()
    report = hqqlora.memory_report(model, step=lambda: model(x).sum().backward())
    assert report.activations == 2 * x.nbytes  # x, and x * x for the weight's gradient


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["own", "peft"])
def test_with_checkpointing_little_is_kept(kind, reentrant):
    model, optimizer = adapted(kind)
    plain = hqqlora.memory_report(model, step=step_of(model, optimizer))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    kept = hqqlora.memory_report(model, step=step_of(model, optimizer))
    block = next(name for name in plain.blocks() if name.endswith("layers.1"))
    assert kept.of(block).activations < plain.of(block).activations / 4
    assert rest(kept.all) == rest(plain.all)


def test_where_A_is_frozen_no_linear_layer_keeps_its_input():
    model, _ = adapted("own")
    M = 2 * 12
    for name, parameter in model.named_parameters():
        if name.endswith("lora_A"):
            parameter.requires_grad_(False)
    report = hqqlora.memory_report(model, step=step_of(model, batch=2, length=12))
    for name, memory in report.layers.items():
        if name.endswith("_proj"):
            assert memory.activations == M * RANK * 4, name  # xa alone


def test_a_step_that_fails_leaves_nothing_behind():
    model = Block(16, 8)

    def fail():
        model(torch.randn(5, 16))
        raise RuntimeError("out of tokens")

    with pytest.raises(RuntimeError, match="out of tokens"):
        hqqlora.memory_report(model, step=fail)
    assert not torch.nn.modules.module._has_any_global_hook()
    kept = []
    y = model(torch.randn(5, 16))
    y.grad_fn._raw_saved_result.register_hooks(lambda t: kept.append(t) or t, lambda t: t)
    assert kept  # autograd saves by itself again: no hooks are left but this one


# ---- the rest --------------------------------------------------------------------------


def test_without_a_step_what_is_there_is_counted():
    model, optimizer = adapted("own")
    before = hqqlora.memory_report(model, optimizer)
    assert (before.gradients, before.optimizer, before.activations) == (0, 0, 0)
    step_of(model)()
    optimizer.step()
    after = hqqlora.memory_report(model, optimizer)
    assert after.gradients == after.adapters == before.adapters
    assert 2 * after.adapters < after.optimizer < 2.1 * after.adapters
    assert hqqlora.memory_report(model).optimizer == 0


def test_merging_keeps_the_codes_from_before():
    model, _ = adapted("own")
    before = hqqlora.memory_report(model)
    for layer in model.modules():
        if isinstance(layer, hqqlora.LoRALinear):
            layer.merge()
    merged = hqqlora.memory_report(model)
    assert (merged.codes, merged.scales) == (2 * before.codes, 2 * before.scales)


def test_on_the_meta_device_it_is_what_would_be_taken():
    model, _ = adapted("own")
    here, meta = hqqlora.memory_report(model), hqqlora.memory_report(model.to("meta"))
    assert here.layers == meta.layers


def test_of_a_dtensor_the_local_shard_counts():
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (4,))
        model = nn.Linear(16, 8)
        model.weight = nn.Parameter(
            DTensor.from_local(model.weight[:2].detach().clone(), mesh, [Shard(0)])
        )
        model.bias = nn.Parameter(
            DTensor.from_local(model.bias.detach().clone(), mesh, [Replicate()])
        )
        assert model.weight.shape == (8, 16)
        assert hqqlora.memory_report(model).dense == (2 * 16 + 8) * 4
    finally:
        torch.distributed.destroy_process_group()


def test_the_table_has_one_line_for_blocks_that_are_alike():
    model, optimizer = adapted("own", num_hidden_layers=4)
    report = hqqlora.memory_report(model, optimizer)
    lines = str(report).splitlines()
    assert lines[0].split() == ["MB", *KINDS, "total"]
    assert [line.split()[0] for line in lines if "layers" in line] == ["model.layers.0"]
    assert any(line.startswith("model.layers.0 to 3, each ") for line in lines)
    assert lines[-1].split()[-2:] == ["?", f"{report.total / 1e6:.1f}"]
    with pytest.raises(KeyError, match=r"layers\.9"):
        report.of("model.layers.9")
    with pytest.raises(AttributeError, match="no attribute 'weights'"):
        _ = report.weights
