"""Layers that share an input compute x A^T in one product: the same results as without, nothing
kept, and the model around them as it was."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from shared_attention import (
    NAMES,
    SHARED,
    Attention,
    assert_as_unshared,
    bounds,
    forward_operations,
    is_shared,
    rows,
    run,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import hqqlora
from hqqlora import shared_projections

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float32),
    "bf16-factors": (torch.bfloat16, torch.bfloat16),
    "fp32-bf16-factors": (torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("M", [2, 10, 200])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_results_are_those_of_separate_layers(dtypes, M):
    """Few rows, some and many; each layer has a rank and a scaling of its own."""
    dtype, factors = DTYPES[dtypes]
    x = rows(dtype, M)
    model = Attention(dtype, factors)
    expected = run(model, x)
    hqqlora.share_projections(model)
    assert_as_unshared(run(model, x), expected, bounds(model, x, expected))
    assert is_shared(model, x)


def test_backward_reads_x_once():
    model = hqqlora.share_projections(Attention())
    assert forward_operations(lambda: run(model, rows())) == {
        **SHARED,
        "lora_factor_gradients": 3,
        "linear_dgrad": 2,
        "lora_input_gradients": 1,
    }


@pytest.mark.parametrize("order", [("v_proj", "q_proj", "k_proj"), ("k_proj", "v_proj")])
def test_any_of_them_may_be_first_and_any_may_be_missing(order):
    x, model = rows(), Attention()
    expected = run(model, x, lambda x: model(x, order))
    hqqlora.share_projections(model)
    found = run(model, x, lambda x: model(x, order))
    limits = bounds(model, x, run(model, x))
    assert_as_unshared(found, expected, limits)  # no gradient for one that was not called


@pytest.mark.parametrize("used", NAMES)
def test_an_output_that_leads_nowhere_gives_no_gradients(used):
    x, model = rows(), Attention()

    def only(x):
        return {used: model(x)[used]}

    expected = run(model, x, only)
    hqqlora.share_projections(model)
    found = run(model, x, only)
    assert_as_unshared(found, expected, bounds(model, x, run(model, x)))


def test_adapters_of_several_dtypes_share():
    x, model = rows(torch.bfloat16), Attention(torch.bfloat16)
    for name in ("lora_A", "lora_B"):
        parameter = getattr(model.k_proj, name)
        parameter.data = parameter.data.bfloat16()
    expected = run(model, x)
    hqqlora.share_projections(model)
    assert_as_unshared(run(model, x), expected, bounds(model, x, expected))
    assert is_shared(model, x)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "q_proj.lora_A", "v_proj.lora_A"])
def test_a_frozen_factor_gets_no_gradient(frozen):
    x, model = rows(), Attention(lora_bias=True)
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    expected = run(model, x)
    hqqlora.share_projections(model)
    assert_as_unshared(run(model, x), expected, bounds(model, x, expected))


def test_x_without_a_gradient_and_without_any():
    model, x = Attention(), rows().detach()
    expected = model(x)
    hqqlora.share_projections(model)
    found = model(x)
    with torch.no_grad():
        plain = model(x)
        assert is_shared(model, x)
    for name in NAMES:
        assert torch.equal(found[name], expected[name])
        assert torch.equal(plain[name], expected[name])
        assert not plain[name].requires_grad


def test_under_autocast_one_cast_serves_all():
    x, model = rows(), Attention()
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model, x)
        hqqlora.share_projections(model)
        found = run(model, x)
        assert is_shared(model, x)
    limits = bounds(model, x.bfloat16(), expected)
    assert_as_unshared(found, expected, limits)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_with_recomputation(use_reentrant):
    x, model = rows(), Attention()
    expected = run(model, x)
    hqqlora.share_projections(model)

    def recomputed(x):
        ys = checkpoint(lambda x: tuple(model(x).values()), x, use_reentrant=use_reentrant)
        return dict(zip(NAMES, ys, strict=True))

    assert_as_unshared(run(model, x, recomputed), expected, bounds(model, x, expected))


# ---- what is kept ----------------------------------------------------------------------


def saved_places(model, x):
    places = []

    def pack(t):
        places.append(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ys = model(x)
    assert ys
    return places.count(x.untyped_storage().data_ptr())


def test_x_is_saved_once_for_the_group():
    model, x = Attention(), rows()
    assert saved_places(model, x) == 3
    assert saved_places(hqqlora.share_projections(model), x) == 1


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("order", [NAMES, NAMES[:2]])
def test_nothing_is_kept_after_a_step(order, grad):
    model = hqqlora.share_projections(Attention())
    x = rows() * 1
    alive = weakref.ref(x)
    with torch.set_grad_enabled(grad):
        ys = model(x, order)
    if grad:
        sum(y.sum() for y in ys.values()).backward()
    del x, ys
    gc.collect()
    assert alive() is None
    if order == NAMES:
        assert shared_projections._pending.waiting == ()


def test_what_one_group_has_left_goes_with_the_next():
    first, second = (hqqlora.share_projections(Attention()) for _ in range(2))
    x = rows().detach().clone()
    left = first.q_proj(x)
    alive = weakref.ref(x)
    del left, x
    second(rows())
    gc.collect()
    assert alive() is None


# ---- the model around ------------------------------------------------------------------


def test_undone_every_layer_computes_for_itself():
    model, x = hqqlora.share_projections(Attention()), rows()
    model.q_proj(x)
    assert hqqlora.unshare_projections(model) is model
    assert forward_operations(lambda: model(x)) == {"lora_linear": 3}
    assert not [a for m in model.modules() for a in vars(m).values() if a is not None
                and type(a).__name__ == "SharedProjection"]  # fmt: skip


def test_no_name_no_parameter_and_no_byte_of_the_state_is_another():
    model = Attention()
    before = model.state_dict()
    names = [name for name, _ in model.named_modules()]
    hqqlora.share_projections(model)
    model(rows())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_shares_among_its_own_layers(duplicate):
    model, x = hqqlora.share_projections(Attention()), rows()
    expected = run(model, x)
    twin = duplicate(model)
    for layer in twin.layers.values():
        assert layer.shared_projection is twin.q_proj.shared_projection
        assert layer.shared_projection is not model.q_proj.shared_projection
        assert layer in layer.shared_projection.members
    assert is_shared(twin, x)
    assert_as_unshared(run(twin, x), expected, {})
    hqqlora.unshare_projections(model)
    assert is_shared(twin, x)


def test_threads_do_not_take_each_others():
    model = hqqlora.share_projections(Attention())
    xs = [rows(seed=seed).detach() for seed in range(4)]
    expected = [model(x) for x in xs]
    wrong = []

    def work(i):
        for _ in range(20):
            ys = model(xs[i])
            wrong.extend(n for n in NAMES if not torch.equal(ys[n], expected[i][n]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="Sequential has no two layers with adapters"):
        hqqlora.share_projections(nn.Sequential(nn.Linear(4, 4)))


def test_names_of_ones_own():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = (getattr(Attention(), n) for n in NAMES[:2])

        def forward(self, x):
            return self.left(x), self.right(x)

    model = Odd()
    with pytest.raises(ValueError, match="no module has two of q_proj, k_proj, v_proj"):
        hqqlora.share_projections(model)
    hqqlora.share_projections(model, [("left", "right")])
    seen = forward_operations(lambda: model(rows()))
    assert seen == {"lora_project": 1, "lora_linear_from_xa": 2}
