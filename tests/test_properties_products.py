"""What the products promise of any weight and input, as properties.

Each is a statement about results alone, so that it holds without trust in another way of
computing them; the bounds are those of the float64 oracle (oracle.py), summed over the results
that a statement compares.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backends import CpuOps, EmulatedOps
from hypothesis import given
from hypothesis import strategies as st
from oracle import Oracle
from product import Product, eighths, random_product
from torch import Tensor
from weight_strategies import dtypes, even_sizes, generator, odd_sizes, quick, seeds, weights

BACKENDS = {
    "torch": torch.ops.hqqlora,
    **{kernel: CpuOps(kernel) for kernel in ("reference", "direct", "blocked", "tiled")},
    **{f"portable {kernel}": CpuOps(kernel, "portable") for kernel in ("direct", "tiled")},
    "emulated cuda": EmulatedOps(),
}
pytestmark = pytest.mark.usefixtures("one_thread")
on_every_backend = pytest.mark.parametrize("ops", BACKENDS.values(), ids=BACKENDS)


@st.composite
def products(draw: st.DrawFn, sizes: st.SearchStrategy[int] | None = None) -> Product:
    """Weights, ranks, dropout and dtypes of every kind."""
    weight = draw(weights() if sizes is None else weights(sizes))
    M, R = draw(st.sampled_from((1, 2, 3, 7, 8, 9, 19, 33))), draw(st.sampled_from((1, 3, 8)))
    dtype, seed = draw(dtypes), draw(seeds)
    factors = draw(st.sampled_from((torch.float32, dtype)))
    dropout = draw(st.sampled_from((0.0, 0.0, 0.25)))
    return random_product(weight, M, R, dtype, factors, dropout, seed)


def inner(left: Tensor, right: Tensor) -> float:
    return (left.double() * right.double()).sum().item()


# ---- linear in x and in dy -----------------------------------------------------------------


@on_every_backend
@quick(20)
@given(p=products(), other=seeds)
def test_a_sum_of_inputs_gives_the_sum_of_the_outputs(ops, p: Product, other: int) -> None:
    """f(x + x') = f(x) + f(x') for y in x, dx in dy, and xa in x; dA and dB are linear in each,
    so here in dy. The sum of the inputs is exact."""
    source = generator(other)
    x, dy = (eighths(*t.shape, source).to(t.dtype) for t in (p.x, p.dy))
    in_dy = replace(p, dy=dy), replace(p, dy=p.dy + dy)
    in_both = replace(p, x=x, dy=dy), replace(p, x=p.x + x, dy=p.dy + dy)
    first = p.results(ops)
    for (second, total), kept in ((in_both, slice(0, 5)), (in_dy, slice(5, 7))):
        for parts, bounds in zip(
            list(zip(first, second.results(ops), total.results(ops), strict=True))[kept],
            list(zip(p.expected(), second.expected(), total.expected(), strict=True))[kept],
            strict=True,
        ):
            left, right, together = (part.double() for part in parts)
            bound = sum(bound for _, bound in bounds)
            assert ((together - left - right).abs() <= bound).all()


@on_every_backend
@quick(20)
@given(p=products())
def test_negative_inputs_give_the_very_negative_outputs(ops, p: Product) -> None:
    """Rounding knows no sign: bit for bit."""
    negative = replace(p, x=-p.x, dy=-p.dy).results(ops)
    for found, expected in zip(negative[:5], p.results(ops)[:5], strict=True):
        assert torch.equal(found, -expected)
    for found, expected in zip(negative[5:], p.results(ops)[5:], strict=True):
        assert torch.equal(found, expected)  # dA and dB: minus times minus


# ---- forward and backward are each other's adjoint -----------------------------------------


@on_every_backend
@quick(20)
@given(p=products())
def test_backward_is_the_adjoint_of_forward(ops, p: Product) -> None:
    """<dy, f(x)> = <f'(dy), x> for the product alone and with the adapter, dropout included:
    each side is off by at most its bounds, weighted with the other factor."""
    results, bounds = p.results(ops), [bound for _, bound in p.expected()]
    for y, dx in ((0, 1), (2, 4)):
        room = inner(p.dy.abs(), bounds[y]) + inner(p.x.abs(), bounds[dx])
        assert abs(inner(p.dy, results[y]) - inner(results[dx], p.x)) <= room


@on_every_backend
@quick(20)
@given(p=products())
def test_gradients_of_the_factors_agree(ops, p: Product) -> None:
    """<dA, A> = <dB, B> = scaling <dy B, drop(x) A^T>: the adapter's output is linear in each
    factor."""
    dA, dB = p.results(ops)[5:]
    (_, dA_bound), (_, dB_bound) = p.expected()[5:]
    A, B = p.adapter.A, p.adapter.B
    room = inner(A.abs(), dA_bound) + inner(B.abs(), dB_bound)
    assert abs(inner(dA, A) - inner(dB, B)) <= room


# ---- one result, whoever computes it -------------------------------------------------------


@quick(60)
@given(p=products())
def test_all_backends_agree(p: Product) -> None:
    """The torch ops, each CPU kernel and the CUDA kernels: any two differ by their two bounds
    at most."""
    bounds = [bound for _, bound in p.expected()]
    first, *others = (p.results(ops) for ops in BACKENDS.values())
    for found in others:
        for left, right, bound in zip(first, found, bounds, strict=True):
            assert left.dtype == right.dtype
            assert ((left.double() - right.double()).abs() <= 2 * bound).all()


large = st.one_of(st.integers(100, 300), st.sampled_from((128, 256, 512)))


@quick(20)
@given(p=products(large))
def test_no_bit_depends_on_the_number_of_threads(p: Product) -> None:
    """But for products that torch's own GEMM serves: two runs of those differ by their bounds
    at most."""
    expected = p.results(torch.ops.hqqlora)
    torch.set_num_threads(2)
    found = p.results(torch.ops.hqqlora)
    torch.set_num_threads(1)
    M, dtype = len(p.x), p.x.dtype
    for i, (left, right, (_, bound)) in enumerate(
        zip(found, expected, p.expected(), strict=True)
    ):
        kernel = CpuOps().chosen(p.weight.packed, M, dtype, transpose=i in (1, 4))
        if kernel == "blocked" and i in (0, 1, 2, 4):
            assert ((left.double() - right.double()).abs() <= 2 * bound).all()
        else:
            assert torch.equal(left, right)


# ---- and wherever its inputs lie -----------------------------------------------------------


def sliced(t: Tensor) -> Tensor:
    """Rows among others, columns among others."""
    rows, columns = t.shape
    wide = torch.full((2 * rows, columns + 5), torch.nan, dtype=t.dtype)
    wide[::2, 2 : 2 + columns] = t
    return wide[::2, 2 : 2 + columns]


def spread(t: Tensor) -> Tensor:
    """Every third element of a row."""
    wide = torch.full((len(t), 3 * t.shape[1]), torch.nan, dtype=t.dtype)
    wide[:, ::3] = t
    return wide[:, ::3]


def shifted(t: Tensor) -> Tensor:
    """Contiguous, one element behind where memory is aligned."""
    return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)


LAYOUTS = {
    "transposed": lambda t: t.T.contiguous().T,
    "sliced": sliced,
    "spread": spread,
    "shifted": shifted,
}
layouts = st.sampled_from(list(LAYOUTS.values()))


@quick(60)
@given(p=products(), of_x=layouts, of_dy=layouts, of_A=layouts, of_B=layouts)
def test_no_bit_depends_on_strides(p: Product, of_x, of_dy, of_A, of_B) -> None:
    adapter = replace(p.adapter, A=of_A(p.adapter.A), B=of_B(p.adapter.B))
    strided = replace(p, x=of_x(p.x), dy=of_dy(p.dy), adapter=adapter)
    assert torch.equal(strided.x, p.x)
    expected = p.results(torch.ops.hqqlora)
    for found, right in zip(strided.results(torch.ops.hqqlora), expected, strict=True):
        assert torch.equal(found, right)


@on_every_backend
@quick(15)
@given(p=products(), layout=st.sampled_from((sliced, shifted)))
def test_no_kernel_cares_how_far_rows_are_apart(ops, p: Product, layout) -> None:
    """Rows as the C interface takes them: ldx and lddy beyond the width, any alignment."""
    strided = replace(p, x=layout(p.x), dy=layout(p.dy))
    for found, right in zip(strided.results(ops), p.results(ops), strict=True):
        assert torch.equal(found, right)


@quick(30)
@given(p=products(), other=st.sampled_from((2, 3, 4)), columns=st.booleans())
def test_expanded_inputs_are_as_their_copies(p: Product, other: int, columns: bool) -> None:
    """Rows that are one row in memory; and, as a sum's gradient, rows of one number."""
    x, dy = (t[:1, :1].expand(other, t.shape[1]) if columns else t[:1].expand(other, -1)
             for t in (p.x, p.dy))  # fmt: skip
    seed_free = replace(p, dropout=0.0, adapter=replace(p.adapter, mask=None))
    expanded = replace(seed_free, x=x, dy=dy)
    copied = replace(seed_free, x=x.contiguous(), dy=dy.contiguous())
    for found, right in zip(
        expanded.results(torch.ops.hqqlora), copied.results(torch.ops.hqqlora), strict=True
    ):
        assert torch.equal(found, right)


def batches(t: Tensor) -> Tensor:
    """[2, M, width], different in each batch."""
    return torch.stack([t, t.flip(0) / 2])


LEADING = {
    "permuted": lambda t: t.transpose(0, 1),
    "rows of a batch": lambda t: t[:, ::2],
    "columns of a larger one": lambda t: sliced(t.reshape(-1, t.shape[-1])).unflatten(
        0, (2, -1)
    ),
    "ones between": lambda t: t[:, None, :, None],
    "every row in each batch": lambda t: t[:1].expand(3, *t.shape[1:]),
}


@quick(40)
@given(p=products(), leading=st.sampled_from(list(LEADING.values())))
def test_no_bit_depends_on_the_strides_of_leading_dimensions(p: Product, leading) -> None:
    """x [..., K] and dy [..., N] of any number of dimensions, in any order of memory."""
    plain = replace(p, dropout=0.0, adapter=replace(p.adapter, mask=None))
    strided = replace(plain, x=leading(batches(p.x)), dy=leading(batches(p.dy)))
    copied = replace(plain, x=strided.x.contiguous(), dy=strided.dy.contiguous())
    assert strided.x.dim() > 2
    assert strided.linear(torch.ops.hqqlora).shape[:-1] == strided.x.shape[:-1]
    for found, right in zip(
        strided.results(torch.ops.hqqlora), copied.results(torch.ops.hqqlora), strict=True
    ):
        assert torch.equal(found, right)


@quick(20)
@given(weight=weights(st.one_of(odd_sizes, even_sizes)), layout=layouts, seed=seeds)
def test_quantizing_does_not_depend_on_strides(weight: Oracle, layout, seed: int) -> None:
    _, _, _, N, K, nbits, G, axis = weight.packed
    W = torch.randn(N, K, generator=generator(seed))
    arguments = (nbits, G, axis, torch.float32)
    expected = torch.ops.hqqlora.quantize(W, *arguments)
    found = torch.ops.hqqlora.quantize(layout(W), *arguments)
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)
