"""Where something stands against sharing x A^T, a layer computes it for itself, and the others
share it all the same."""

import pytest
import torch
from shared_attention import (
    NAMES,
    Attention,
    assert_as_unshared,
    bounds,
    forward_operations,
    is_shared,
    rows,
    run,
)

import hqqlora

pytestmark = pytest.mark.usefixtures("one_thread")


def disable(model):
    model.k_proj.disable()


def merge(model):
    model.k_proj.merge()


@pytest.mark.parametrize("change", [disable, merge])
def test_a_layer_whose_adapter_is_off_leaves_the_others_to_share(change):
    x, model = rows(), Attention()
    change(model)
    expected = run(model, x)
    hqqlora.share_projections(model)
    found = run(model, x)
    limits = bounds(model, x, expected)
    assert_as_unshared(found, expected, limits)
    assert forward_operations(lambda: model(x)) == {
        "lora_project": 1,
        "lora_linear_from_xa": 2,
        "linear": 1,
    }


def test_dropout_in_training_keeps_layers_apart():
    x, model = rows(), Attention(lora_dropout=0.5)
    torch.manual_seed(1)
    expected = run(model, x)
    hqqlora.share_projections(model)
    torch.manual_seed(1)
    assert_as_unshared(run(model, x), expected, {})
    assert forward_operations(lambda: model(x)) == {"lora_linear": 3}
    assert is_shared(model.eval(), x)


def test_ranks_that_add_up_to_more_than_256_are_shared_as_far_as_they_go():
    x, model = rows(), Attention(ranks=(200, 100, 50))
    expected = run(model, x)
    hqqlora.share_projections(model)
    found = run(model, x)
    assert_as_unshared(found, expected, bounds(model, x, expected))
    assert forward_operations(lambda: model(x)) == {
        "lora_project": 1,
        "lora_linear_from_xa": 2,
        "lora_linear": 1,
    }


def test_an_input_changed_in_place_is_projected_again():
    model, x = Attention(), rows().detach()
    with torch.no_grad():
        expected = model.q_proj(x), model.k_proj(2 * x)
        hqqlora.share_projections(model)
        found = [model.q_proj(x)]
        x.mul_(2)
        found.append(model.k_proj(x))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_factor_changed_between_the_calls_is_seen():
    model, x = Attention(), rows()
    hqqlora.share_projections(model)
    model.q_proj(x)
    with torch.no_grad():
        model.k_proj.lora_A.mul_(2)
    found = model.k_proj(x)
    hqqlora.unshare_projections(model)
    assert torch.equal(found, model.k_proj(x))


def test_a_layer_with_another_input_leaves_the_others_to_share():
    """As the q of a cross attention."""
    model, x, other = Attention(), rows(), rows(seed=6)

    def cross():
        return model.q_proj(x), model.k_proj(other), model.v_proj(other)

    expected = cross()
    hqqlora.share_projections(model)
    assert all(map(torch.equal, cross(), expected))
    apart = {"lora_linear": 1, "lora_project": 1, "lora_linear_from_xa": 2}
    assert forward_operations(cross) == apart
    assert all(map(torch.equal, cross(), expected))


def test_two_layers_with_different_inputs_are_given_up():
    model, x = hqqlora.share_projections(Attention()), rows()
    model.v_proj.disable()
    for _ in range(2):
        model.q_proj(x)
        model.k_proj(x.clone())  # the same numbers, but who knows that
    assert forward_operations(lambda: (model.q_proj(x), model.k_proj(x.clone()))) == {
        "lora_linear": 2
    }


def test_in_inference_mode_layers_compute_for_themselves():
    """A tensor of which torch does not know whether it was changed."""
    model = hqqlora.share_projections(Attention())
    with torch.inference_mode():
        x = rows().detach().clone()
        assert forward_operations(lambda: model(x)) == {"lora_linear": 3}


def test_torch_func_goes_its_own_way():
    model, x = Attention(), rows().detach()
    expected = torch.func.vmap(model)(x)
    hqqlora.share_projections(model)
    found = torch.func.vmap(model)(x)
    for name in NAMES:
        assert torch.equal(found[name], expected[name])


def test_double_backward_is_refused():
    model, x = hqqlora.share_projections(Attention()), rows()
    (dx,) = torch.autograd.grad(
        sum(y.sin().sum() for y in model(x).values()), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dx.sum().backward()
