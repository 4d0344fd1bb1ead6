"""hqqlora.autograd: gradients against float64, what is computed and kept, and the company of
autocast, checkpointing and torch.func."""

import itertools

import oracle
import pytest
import torch
from oracle import FLOATING, Adapter, random_adapter, random_weight
from torch.utils.checkpoint import checkpoint

from hqqlora.autograd import linear, lora_linear

M, N, K, R = 6, 24, 64, 4


@pytest.fixture
def weight():
    return random_weight(N, K, 32)


def parameters(weight, dtype=torch.float32, rows=(2, 3)):
    """x, bias, A, B, all of which require gradients."""
    adapter = random_adapter(N, K, R)
    leaves = torch.randn(*rows, K).to(dtype), torch.randn(N), adapter.A, adapter.B
    return tuple(leaf.requires_grad_() for leaf in leaves)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("axis", [0, 1])
def test_gradients_of_linear(axis, dtype):
    weight = random_weight(N, K, 24 if axis == 0 else 32, 4, axis)
    x, bias, _, _ = parameters(weight, dtype)
    y = linear(x, weight.packed, bias)
    oracle.check_linear(x.detach(), y.detach(), weight, bias.detach())
    dy = torch.randn_like(y)
    y.backward(dy)
    oracle.check_dgrad(dy, x.grad, weight)
    torch.testing.assert_close(bias.grad, dy.float().sum((0, 1)))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)))
def test_gradients_of_lora_linear(weight, dtype, p, needs):
    x, bias, A, B = parameters(weight, dtype)
    for leaf, needed in zip((x, A, B), needs, strict=True):
        leaf.requires_grad_(needed)
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,))  # as lora_linear draws it
    mask = oracle.dropout_mask(M, K, p, seed) if p else None
    adapter = Adapter(A.detach(), B.detach(), 0.5, mask)
    torch.manual_seed(3)
    y = lora_linear(x, weight.packed, bias, A, B, 0.5, p)
    assert y.grad_fn is not None
    dy = torch.randn_like(y)
    y.backward(dy)
    for leaf, needed in zip((x, A, B), needs, strict=True):
        assert (leaf.grad is not None) == needed
    adapter.check_backward(dy, x.detach(), (x.grad, A.grad, B.grad), weight)
    torch.testing.assert_close(bias.grad, dy.float().sum((0, 1)))


def test_gradients_of_lora_linear_agree_with_differences(weight):
    """float64 differences of the exact function, along random directions."""
    x, bias, A, B = parameters(weight)
    W = weight.W

    def exact(x, bias, A, B):
        return ((x @ W.T + bias + 0.5 * (x @ A.T) @ B.T).sin()).sum()

    lora_linear(x, weight.packed, bias, A, B, 0.5).sin().sum().backward()
    points = [leaf.detach().double() for leaf in (x, bias, A, B)]
    for i, leaf in enumerate((x, bias, A, B)):
        direction = torch.randn(leaf.shape, dtype=torch.float64)
        steps = []
        for sign in (1, -1):
            moved = list(points)
            moved[i] = points[i] + sign * 1e-5 * direction
            steps.append(exact(*moved))
        slope = (steps[0] - steps[1]) / 2e-5
        found = (leaf.grad.double() * direction).sum()
        assert abs(found - slope) < 1e-4 * (leaf.grad.double() * direction).abs().sum()


# ---- what is computed and what is kept --------------------------------------------------


def kept_by(function):
    """The tensors that the graph of function() keeps for its backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = function()
    return y, kept


@pytest.mark.parametrize(
    ("needs", "keeps_x", "keeps_xa"),
    [
        ((True, False, False), False, False),
        ((False, True, False), True, False),
        ((False, False, True), False, True),
        ((True, True, True), True, True),
    ],
)
def test_only_what_backward_needs_is_kept(weight, needs, keeps_x, keeps_xa):
    x, _, A, B = parameters(weight)
    for leaf, needed in zip((x, A, B), needs, strict=True):
        leaf.requires_grad_(needed)
    _, kept = kept_by(lambda: lora_linear(x, weight.packed, None, A, B, 0.5, 0.1))
    shapes = [t.shape for t in kept if t.dtype == torch.float32]
    assert (x.shape in shapes) == keeps_x
    assert ((M, R) in shapes) == keeps_xa
    assert (N, K) not in shapes  # no dequantized weight
    packed = [t.data_ptr() for t in weight.packed[:3]]
    assert packed == [t.data_ptr() for t in kept if t.data_ptr() in packed]  # no copies of it


def test_linear_keeps_no_activation(weight):
    x, bias, _, _ = parameters(weight)
    _, kept = kept_by(lambda: linear(x, weight.packed, bias))
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in weight.packed[:3]]


def test_no_graph_where_none_is_needed(weight):
    x, bias, A, B = (leaf.detach() for leaf in parameters(weight))
    assert linear(x, weight.packed, bias).grad_fn is None
    assert lora_linear(x, weight.packed, bias, A, B, 0.5).grad_fn is None
    A.requires_grad_()
    assert lora_linear(x, weight.packed, bias, A, B, 0.5).grad_fn is not None
    with torch.no_grad():
        assert lora_linear(x, weight.packed, bias, A, B, 0.5).grad_fn is None
    with torch.inference_mode():
        assert lora_linear(x, weight.packed, bias, A, B, 0.5).is_inference()


def test_first_layer_computes_no_dx(weight):
    """x of embeddings without gradients: dA and dB, no product with the frozen weight."""
    x, _, A, B = parameters(weight)
    x = x.detach()
    y = lora_linear(x, weight.packed, None, A, B, 0.5)
    with torch.profiler.profile(record_shapes=True) as profile:
        y.sum().backward()
    (event,) = [e for e in profile.events() if e.name == "hqqlora::lora_linear_backward"]
    assert event.concrete_inputs[-3:] == [False, True, True]


def test_an_input_changed_in_place_is_noticed(weight):
    x, bias, A, B = parameters(weight)
    hidden = x * 1
    y = lora_linear(hidden, weight.packed, bias, A, B, 0.5)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_weights_are_frozen(weight):
    packed = weight.packed._replace(scale=weight.packed.scale.clone().requires_grad_())
    x, bias, A, B = parameters(weight)
    with pytest.raises(ValueError, match=r"frozen.*requires_grad_\(False\)"):
        linear(x, packed, bias)
    with pytest.raises(ValueError, match=r"frozen.*requires_grad_\(False\)"):
        lora_linear(x, packed, bias, A, B, 0.5)


def test_double_backward_is_refused(weight):
    x, bias, A, B = parameters(weight)
    for y in (
        linear(x, weight.packed, bias).square(),
        lora_linear(x, weight.packed, bias, A, B, 0.5),  # dy is constant, dA is not
    ):
        gradients = torch.autograd.grad(y.sum(), (x, bias), create_graph=True)
        assert gradients[0].requires_grad
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            gradients[0].square().sum().backward()
    # asked for, but not used: no error
    y = lora_linear(x, weight.packed, bias, A, B, 0.5).square().sum()
    (dA,) = torch.autograd.grad(y, (A,), create_graph=True)
    assert dA.shape == A.shape


# ---- dropout ---------------------------------------------------------------------------


def test_dropout_follows_torchs_generator(weight):
    x, bias, A, B = parameters(weight)
    state = torch.get_rng_state()
    plain = lora_linear(x, weight.packed, bias, A, B, 0.5)
    assert torch.equal(torch.get_rng_state(), state)  # no dropout draws nothing
    assert torch.equal(lora_linear(x, weight.packed, bias, A, B, 0.5, 0.0), plain)
    torch.manual_seed(1)
    first = lora_linear(x, weight.packed, bias, A, B, 0.5, 0.5)
    second = lora_linear(x, weight.packed, bias, A, B, 0.5, 0.5)
    torch.manual_seed(1)
    assert torch.equal(lora_linear(x, weight.packed, bias, A, B, 0.5, 0.5), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, plain)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_checkpoint(weight, use_reentrant, p):
    leaves = parameters(weight)

    def layer(x, bias, A, B):
        return lora_linear(torch.sin(x), weight.packed, bias, A, B, 0.5, p).cos()

    def gradients(function):
        torch.manual_seed(5)
        y = function(*leaves)
        torch.rand(3)  # the generator moves on between forward and backward
        for leaf in leaves:
            leaf.grad = None
        y.square().sum().backward()
        return [y, *(leaf.grad for leaf in leaves)]

    expected = gradients(layer)
    found = gradients(lambda *a: checkpoint(layer, *a, use_reentrant=use_reentrant))
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)


# ---- autocast --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(weight, dtype):
    x, bias, A, B = parameters(weight)
    with torch.autocast("cpu", dtype):
        y, plain = lora_linear(x, weight.packed, bias, A, B, 0.5), linear(x, weight.packed)
    assert y.dtype == plain.dtype == dtype
    assert torch.equal(y, lora_linear(x.to(dtype), weight.packed, bias, A, B, 0.5))
    assert torch.equal(plain, linear(x.to(dtype), weight.packed))
    y.float().sum().backward()
    for leaf in (x, bias, A, B):
        assert leaf.grad.dtype == torch.float32
    low = x.detach().to(dtype).requires_grad_()
    lora_linear(low, weight.packed, bias, A, B, 0.5).float().sum().backward()
    assert torch.equal(x.grad, low.grad.float())


def test_autocast_reconciles_dtypes(weight):
    """Parameters in a third dtype, which would be refused outside."""
    x, bias, A, B = parameters(weight)
    bias, A, B = bias.half(), A.half(), B.half()
    with pytest.raises(RuntimeError, match="must be float32 or bfloat16"):
        lora_linear(x.bfloat16(), weight.packed, bias, A, B, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, weight.packed, bias, A, B, 0.5)
    expected = lora_linear(
        x.bfloat16(), weight.packed, bias.bfloat16(), A.float(), B.float(), 0.5
    )
    assert torch.equal(y, expected)


# ---- torch.func ------------------------------------------------------------------------


def test_func_grad_and_per_sample_gradients(weight):
    x, bias, A, B = (leaf.detach() for leaf in parameters(weight, rows=(5, 3)))

    def loss(A, B, bias, x):
        y = lora_linear(x, weight.packed, bias, A, B, 0.5) + linear(x, weight.packed)
        return y.square().sum()

    def expected(*rows):
        leaves = [leaf.clone().requires_grad_() for leaf in (A, B, bias)]
        return torch.autograd.grad(loss(*leaves, *rows), leaves)

    for found, right in zip(
        torch.func.grad(loss, (0, 1, 2))(A, B, bias, x), expected(x), strict=True
    ):
        torch.testing.assert_close(found, right)
    per_sample = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (None, None, None, 0))
    for i, found in enumerate(zip(*per_sample(A, B, bias, x), strict=True)):
        for left, right in zip(found, expected(x[i]), strict=True):
            torch.testing.assert_close(left, right)


def test_vmap_over_any_argument(weight):
    x, bias, A, B = (leaf.detach() for leaf in parameters(weight, rows=(5, 3)))
    stacked = torch.stack([A, 2 * A, 3 * A], 1)
    batched = torch.func.vmap(
        lambda A: lora_linear(x, weight.packed, bias, A, B, 0.5), in_dims=1, out_dims=1
    )(stacked)
    for i in range(3):
        single = lora_linear(x, weight.packed, bias, stacked[:, i], B, 0.5)
        torch.testing.assert_close(batched[:, i], single)
    samples = torch.func.vmap(lambda x: linear(x, weight.packed, bias), in_dims=1)(x)
    torch.testing.assert_close(samples, linear(x, weight.packed, bias).transpose(0, 1))
    for randomness, same in (("same", True), ("different", False)):
        dropped = torch.func.vmap(
            lambda x: lora_linear(x, weight.packed, bias, A, B, 0.5, 0.5),
            randomness=randomness,
        )(x[:1].expand(2, 3, K))
        assert torch.equal(dropped[0], dropped[1]) == same


def test_forward_mode(weight):
    x, bias, A, B = (leaf.detach() for leaf in parameters(weight))
    tangent = torch.randn_like(x)
    _, dy = torch.func.jvp(lambda x: linear(x, weight.packed, bias), (x,), (tangent,))
    torch.testing.assert_close(dy, linear(tangent, weight.packed))
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(
            lambda x: lora_linear(x, weight.packed, bias, A, B, 0.5), (x,), (tangent,)
        )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(linear(dual, weight.packed, bias))
        torch.testing.assert_close(found.tangent, linear(tangent, weight.packed))
