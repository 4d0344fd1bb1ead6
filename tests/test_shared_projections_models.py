"""Sharing in whole models, with hqqlora's adapters and PEFT's: trained, saved, switched,
compiled."""

import pytest
import torch
from compiled_models import Graphs, adapted_llama, gradients, graph_breaks, ours_in
from peft_models import fill_adapters, operations, tiny_quantized, token_ids
from shared_attention import Attention, rows
from torch import nn
from torch._dynamo.utils import counters

import hqqlora

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

KINDS = ("own", "peft")
LAYERS = 2
# of a block: q, k and v; gate and up; and o and down by themselves
FORWARD = {"lora_project": 2, "lora_linear_from_xa": 5, "lora_linear": 2}
BACKWARD = {"lora_factor_gradients": 5, "lora_input_gradients": 2, "lora_linear_backward": 2}
# the embeddings need no gradient, so that the first block's k and v need none of x
DGRADS = 3 * LAYERS - 2
APART = {"lora_linear": 7, "lora_linear_backward": 7}


def times(counts, factor):
    return {name: factor * count for name, count in counts.items()}


def peft_model(**options):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})
    return fill_adapters(get_peft_model(tiny_quantized(), config))


def make(kind, **options):
    if kind == "peft":
        return peft_model(**options).train()
    model = hqqlora.add_lora(tiny_quantized(), r=4, lora_alpha=8, **options)
    return fill_adapters(model).train()


def loss_of(model):
    ids = token_ids()
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def operations_of(model, step=True):
    model.zero_grad(set_to_none=True)
    with operations() as seen:
        loss = loss_of(model)
        if step:
            loss.backward()
    return dict(seen.counts)


def losses(model, steps=3):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    found = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_of_training_are_those_without_sharing(kind):
    """The first loss bit for bit. Gradients differ by float32's rounding, and AdamW, whose step
    is lr whatever the gradient's size, carries that into elements whose gradient is next to
    nothing: as many as rounding's share of all, moving as many by 2 lr."""
    expected = losses(make(kind))
    model = hqqlora.share_projections(make(kind))
    found = losses(model)
    assert found[0] == expected[0]
    assert expected[2] < expected[0] - 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert operations_of(model) == times(FORWARD | BACKWARD, LAYERS) | {"linear_dgrad": DGRADS}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_without_sharing(kind):
    model = make(kind)
    expected = gradients(model, lambda: loss_of(model))
    hqqlora.share_projections(model)
    found = gradients(model, lambda: loss_of(model))
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        # of the largest element: each comes through the roundings of at most two blocks
        torch.testing.assert_close(
            found[name], right, rtol=0, atol=2e-6 * float(right.abs().max()), msg=name
        )


@pytest.mark.parametrize("kind", KINDS)
def test_undone_the_model_is_as_before(kind):
    model = hqqlora.unshare_projections(hqqlora.share_projections(make(kind)))
    assert operations_of(model) == times(APART, LAYERS)


# ---- saving ----------------------------------------------------------------------------


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_the_same_byte_for_byte(kind, tmp_path):
    def save(model, folder):
        if kind == "peft":
            model.save_pretrained(folder)
        else:
            hqqlora.save_adapter(model, folder)
        torch.save(model.state_dict(), folder / "state.pt")
        return files_of(folder)

    model = make(kind)
    expected = save(model, tmp_path / "adapter")
    hqqlora.share_projections(model)
    operations_of(model)
    assert save(model, tmp_path / "adapter") == expected


# ---- PEFT's switches -------------------------------------------------------------------


def test_an_adapter_switched_off_and_on():
    model = hqqlora.share_projections(peft_model())
    with torch.no_grad():
        expected = loss_of(model)
        with model.disable_adapter():
            assert operations_of(model, step=False) == {"linear": 7 * LAYERS}
        assert loss_of(model) == expected
    assert operations_of(model) == times(FORWARD | BACKWARD, LAYERS) | {"linear_dgrad": DGRADS}


def test_another_adapter_is_the_one_that_is_shared():
    from peft import LoraConfig

    model = peft_model()
    model.add_adapter("other", LoraConfig(r=8, target_modules="all-linear"))
    fill_adapters(model, seed=2)
    model.set_adapter("other")
    with torch.no_grad():
        expected = loss_of(model)
        hqqlora.share_projections(model)
        assert loss_of(model) == expected
        assert operations_of(model, step=False) == times(FORWARD, LAYERS)
        model.set_adapter("default")
        shared = loss_of(model)
        hqqlora.unshare_projections(model)
        assert loss_of(model) == shared != expected


def test_several_active_adapters_and_dora_are_not_shared():
    from peft import LoraConfig

    model = peft_model()
    model.add_adapter("other", LoraConfig(r=8, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "other"])
    hqqlora.share_projections(model)
    assert operations_of(model) == times(APART, LAYERS)
    dora = hqqlora.share_projections(peft_model(use_dora=True))
    assert "lora_project" not in operations_of(dora)


def test_dropout_in_training_is_not_shared():
    model = hqqlora.share_projections(make("peft", lora_dropout=0.3))
    assert operations_of(model) == times(APART, LAYERS)
    assert operations_of(model.eval(), step=False) == times(FORWARD, LAYERS)


def test_mixed_batches_go_their_own_way():
    model = hqqlora.share_projections(peft_model().eval())
    ids = token_ids()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = model(input_ids=ids, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(found[:1], expected[:1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[1:], expected[1:], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("unload", ["merge_and_unload", "unload"])
def test_merged_and_unloaded_nothing_is_left(unload):
    model = peft_model().eval()
    shared = hqqlora.share_projections(peft_model().eval())
    plain, left = getattr(model, unload)(), getattr(shared, unload)()
    with torch.no_grad():
        assert loss_of(left) == loss_of(plain)
        assert operations_of(left, step=False) == {"linear": 7 * LAYERS}


# ---- compiled --------------------------------------------------------------------------


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    counters.clear()
    yield Graphs()
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_a_llama_is_one_graph_without_a_recompile(kind, compiler):
    model = adapted_llama(kind)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    for_itself = {}
    lengths = (12, 33, 12)
    for length in lengths:
        ids = token_ids(length=length)
        for_itself[length] = gradients(
            model, lambda ids=ids: model(input_ids=ids, use_cache=False).logits
        )
    hqqlora.share_projections(model)
    for length in lengths:
        ids = token_ids(length=length)
        torch._dynamo.mark_dynamic(ids, 1, min=2, max=64)
        found = gradients(
            model, lambda ids=ids: compiled(input_ids=ids, use_cache=False).logits
        )
        for name, right in for_itself[length].items():
            torch.testing.assert_close(
                found[name], right, rtol=0, atol=1e-5 * float(right.abs().max()), msg=name
            )
    assert compiler.frames == 1
    assert graph_breaks() == {}
    forward, backward = (
        {k.removeprefix("hqqlora::"): n for k, n in ours_in(graph).items()}
        for graph in (compiler.forward[0], compiler.backward[0])
    )
    assert forward == FORWARD
    assert backward == BACKWARD | {"linear_dgrad": 1}


def test_compiled_after_and_before_eager_steps(compiler):
    """The state of sharing makes no guard fail, whichever way a step went."""
    model = hqqlora.share_projections(adapted_llama("own"))
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    ids = token_ids()
    for forward in (compiled, model, compiled, model, compiled):
        forward(input_ids=ids, use_cache=False).logits.sum().backward()
    assert compiler.frames == 1


def test_layers_compiled_one_by_one(compiler):
    model = hqqlora.share_projections(adapted_llama("own"))
    layers = [m for m in model.modules() if isinstance(m, hqqlora.LoRALinear)]
    expected = gradients(model, lambda: loss_of(model))
    for layer in layers:
        nn.Module.compile(layer, backend=compiler)
    for _ in range(2):
        found = gradients(model, lambda: loss_of(model))
        for name, right in expected.items():
            torch.testing.assert_close(
                found[name], right, rtol=0, atol=1e-5 * float(right.abs().max()), msg=name
            )


def test_compiled_an_input_changed_in_place_is_projected_again(compiler):
    """The graph ends there."""
    model, x = Attention(), rows().detach()

    def between(x):
        x = x + 0
        first = model.q_proj(x)
        x.mul_(2)
        return first, model.k_proj(x)

    expected = between(x)
    hqqlora.share_projections(model)
    found = torch.compile(between, backend=compiler)(x)
    assert all(map(torch.equal, found, expected))
