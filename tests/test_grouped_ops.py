"""torch.ops.hqqlora.grouped_*: rows sorted by expert, each expert's product held to the float64
oracle of its own weight, on the CPU and on the emulated CUDA library."""

from __future__ import annotations

import ctypes as ct
from dataclasses import dataclass, replace

import backends
import pytest
import torch
from oracle import Adapter, Oracle, check_dgrad, check_linear, dropout_mask, random_weight
from torch import Tensor

from hqqlora.autograd import grouped_linear, grouped_lora_linear
from hqqlora.ops import PackedWeight

ops = torch.ops.hqqlora
N, K, G, R = 64, 96, 32, 4
ROUTINGS = {
    "mixed": [0, 3, 3, 20, 21, 61],
    "all_in_one": [0, 0, 9, 9, 9, 9],
    "none": [0, 0, 0, 0, 0, 0],
    "single": [0, 7],
}


@dataclass
class Problem:
    experts: list[Oracle]
    packed: PackedWeight
    offsets: Tensor
    x: Tensor
    dy: Tensor
    A: Tensor
    B: Tensor

    def rows(self, tensor: Tensor) -> list[Tensor]:
        """The rows of each expert."""
        return list(tensor.split(self.offsets.diff().tolist()))


def problem(
    routing: str = "mixed",
    nbits: int = 4,
    axis: int = 1,
    dtype: torch.dtype = torch.float32,
    lora_dtype: torch.dtype = torch.float32,
) -> Problem:
    offsets = torch.tensor(ROUTINGS[routing])
    E, M = len(offsets) - 1, int(offsets[-1])
    experts = [random_weight(N, K, G, nbits, axis) for _ in range(E)]
    stacked = (torch.stack([e.packed[i] for e in experts]) for i in range(3))
    packed = PackedWeight(*stacked, *experts[0].packed[3:])
    A = (torch.randn(E, R, K) / K**0.5).to(lora_dtype)
    B = (torch.randn(E, N, R) * 0.1).to(lora_dtype)
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    return Problem(experts, packed, offsets, x, dy, A, B)


class EmulatedGroupedOps(backends.EmulatedOps):
    """The grouped entry points of the emulated CUDA library."""

    def grouped(self, name: str, outputs: list, inputs: list, p: Problem, lora, dtype) -> None:
        weight = self.weight(*p.packed)
        routing = (ct.c_int64 * 2)(len(p.offsets) - 1, p.offsets.data_ptr())
        descriptors = [ct.byref(weight), *([ct.byref(lora)] if lora else [])]
        size = ct.c_size_t()
        tail = (ct.byref(routing), backends.DTYPES[dtype])
        context = ct.byref(self.context)
        lora_or_null = ct.byref(lora) if lora else None
        self.check(
            self.lib.hqq_grouped_workspace_size(
                ct.byref(size), ct.byref(weight), lora_or_null, *tail, context
            )
        )
        memory = torch.full((size.value + 64,), 0xFF, dtype=torch.uint8)
        memory = memory[-memory.data_ptr() % 64 :]
        arguments = [*map(backends.pointer, outputs), *inputs, *descriptors, *tail]
        entry = getattr(self.lib, f"hqq_{name}")
        self.check(entry(*arguments, backends.pointer(memory), size, context))

    def adapter_of(self, p: Problem, scaling: float) -> backends.Lora:
        return backends.Lora(
            R,
            backends.DTYPES[p.A.dtype],
            backends.pointer(p.A),
            backends.pointer(p.B),
            scaling,
            0.0,
            0,
        )


def test_forward_and_dgrad_of_every_format() -> None:
    for nbits in (8, 4, 3, 2, 1):
        for axis in (0, 1):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                p = problem(nbits=nbits, axis=axis, dtype=dtype)
                y = ops.grouped_linear(p.x, *p.packed[:3], p.offsets, *p.packed[3:])
                dx = ops.grouped_linear_dgrad(p.dy, *p.packed[:3], p.offsets, *p.packed[3:])
                for e, expert in enumerate(p.experts):
                    check_linear(p.rows(p.x)[e], p.rows(y)[e], expert)
                    check_dgrad(p.rows(p.dy)[e], p.rows(dx)[e], expert)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("dtype", "lora_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_each_expert_has_its_own_adapter(routing, dtype, lora_dtype, dropout) -> None:
    p = problem(routing, dtype=dtype, lora_dtype=lora_dtype)
    seed = torch.tensor([77])
    numbers = (0.5, dropout, *p.packed[3:])
    operands = (*p.packed[:3], p.offsets, p.A, p.B, seed)
    y, xa = ops.grouped_lora_linear(p.x, *operands, *numbers)
    dx, dA, dB = ops.grouped_lora_linear_backward(
        p.dy, p.x, xa, *operands, *numbers, True, True, True
    )
    for e, expert in enumerate(p.experts):
        x, dy = p.rows(p.x)[e], p.rows(p.dy)[e]
        # the mask of an expert is that of its own rows, with the seed plus its number
        mask = dropout_mask(len(x), K, dropout, seed + e) if dropout and len(x) else None
        adapter = Adapter(p.A[e], p.B[e], 0.5, mask)
        adapter.check_forward(x, p.rows(y)[e], p.rows(xa)[e], expert)
        adapter.check_backward(dy, x, (p.rows(dx)[e], dA[e], dB[e]), expert)
        if not len(x):
            assert not dA[e].any()
            assert not dB[e].any()


def test_equals_the_same_products_one_by_one_bit_for_bit_on_any_number_of_threads(
    keep_threads: None,
) -> None:
    p = problem(dtype=torch.bfloat16)
    expected = torch.cat(
        [
            ops.linear(rows, *expert.packed[:3], None, *expert.packed[3:])
            for rows, expert in zip(p.rows(p.x), p.experts, strict=True)
        ]
    )
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = ops.grouped_linear(p.x, *p.packed[:3], p.offsets, *p.packed[3:])
        assert torch.equal(y, expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_emulated_cuda_library_holds_the_same_bounds(dtype, axis) -> None:
    cuda = EmulatedGroupedOps()
    p = problem(dtype=dtype, axis=axis)
    M, lora = len(p.x), cuda.adapter_of(p, 0.5)
    y, dx = (
        torch.full((M, N), torch.nan, dtype=dtype),
        torch.full((M, K), torch.nan, dtype=dtype),
    )
    x_of, dy_of = backends.matrix(p.x), backends.matrix(p.dy)
    cuda.grouped("grouped_linear", [y], [*x_of], p, None, dtype)
    cuda.grouped("grouped_linear_dgrad", [dx], [*dy_of], p, None, dtype)
    for e, expert in enumerate(p.experts):
        check_linear(p.rows(p.x)[e], p.rows(y)[e], expert)
        check_dgrad(p.rows(p.dy)[e], p.rows(dx)[e], expert)

    xa, dA, dB = torch.full((M, R), torch.nan), torch.full_like(p.A, torch.nan), p.B * torch.nan
    cuda.grouped("grouped_lora_linear", [y, xa], [*x_of], p, lora, dtype)
    inputs = [*dy_of, *x_of, backends.pointer(xa)]
    cuda.grouped("grouped_lora_linear_backward", [dx, dA, dB], inputs, p, lora, dtype)
    for e, expert in enumerate(p.experts):
        x, dy = p.rows(p.x)[e], p.rows(p.dy)[e]
        adapter = Adapter(p.A[e], p.B[e], 0.5)
        adapter.check_forward(x, p.rows(y)[e], p.rows(xa)[e], expert)
        adapter.check_backward(dy, x, (p.rows(dx)[e], dA[e], dB[e]), expert)


def test_strided_rows_and_factors_are_taken() -> None:
    p = problem()
    wide = torch.randn(len(p.x), 2 * K)
    x = wide[:, ::2]
    B = p.B.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    arguments = (*p.packed[:3], p.offsets, p.A, B, None, 1.0, 0.0, *p.packed[3:])
    y, _ = ops.grouped_lora_linear(x, *arguments)
    plain, _ = ops.grouped_lora_linear(
        x.contiguous(), *p.packed[:3], p.offsets, p.A, p.B, None, 1.0, 0.0, *p.packed[3:]
    )
    assert torch.equal(y, plain)


def test_opcheck() -> None:
    p = problem()
    format_ = p.packed[3:]
    weight = (*p.packed[:3], p.offsets)
    adapter = (p.A, p.B, torch.tensor([3]), 0.5, 0.25)
    _, xa = ops.grouped_lora_linear(p.x, *weight, *adapter, *format_)
    backward = (p.dy, p.x, xa, *weight, *adapter, *format_)
    for op, arguments in (
        (ops.grouped_linear, (p.x, *weight, *format_)),
        (ops.grouped_linear_dgrad, (p.dy, *weight, *format_)),
        (ops.grouped_lora_linear, (p.x, *weight, *adapter, *format_)),
        (ops.grouped_lora_linear_backward, (*backward, True, True, True)),
        (ops.grouped_lora_linear_backward, (*backward, True, False, False)),
    ):
        torch.library.opcheck(op.default, arguments)


def test_gradients_flow_to_what_needs_them() -> None:
    p = problem()
    x, A, B = (t.clone().requires_grad_() for t in (p.x, p.A, p.B))
    grouped_linear(x, p.packed, p.offsets).backward(p.dy)
    for e, expert in enumerate(p.experts):
        check_dgrad(p.rows(p.dy)[e], p.rows(x.grad)[e], expert)
    x.grad = None
    grouped_lora_linear(x, p.packed, p.offsets, A, B, 0.5).backward(p.dy)
    frozen = p.A.clone()
    grouped_lora_linear(p.x, p.packed, p.offsets, frozen, B, 0.5).backward(p.dy)
    assert frozen.grad is None
    for e, expert in enumerate(p.experts):
        gradients = (p.rows(x.grad)[e], A.grad[e], B.grad[e] / 2)
        adapter = Adapter(p.A[e], p.B[e], 0.5)
        adapter.check_backward(p.rows(p.dy)[e], p.rows(p.x)[e], gradients, expert)


def test_second_derivatives_are_refused() -> None:
    p = problem()
    x = p.x.clone().requires_grad_()
    y = grouped_linear(x, p.packed, p.offsets)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()


def test_compiles_without_a_break_for_any_number_of_rows() -> None:
    p = problem("mixed")

    def loss(x: Tensor, offsets: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return grouped_lora_linear(x * 2, p.packed, offsets, A, B, 0.5).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (61, 30):
        x = p.x[:rows].clone().requires_grad_()
        same = x.detach().clone().requires_grad_()
        offsets = p.offsets.clamp(max=rows)
        compiled(x, offsets, p.A, p.B).backward()
        loss(same, offsets, p.A, p.B).backward()
        assert torch.equal(x.grad, same.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": torch.tensor([0, 3, 3, 20, 21, 60])}, "must end with the 61 rows of x"),
        ({"offsets": torch.tensor([0, 30, 3, 20, 21, 61])}, r"offsets\[2\] is 3, less than"),
        ({"offsets": torch.tensor([1, 3, 3, 20, 21, 61])}, r"offsets\[0\] is 1; expected 0"),
        ({"offsets": torch.tensor([0, 61])}, "W_q must have .* for each of 1 experts"),
        ({"offsets": torch.tensor([0, 3, 3, 20, 21, 61]).int()}, "int64 .* got int32"),
        ({"offsets": torch.tensor([0])}, r"shape \[experts \+ 1\], got int64 of shape \[1\]"),
        ({"x": torch.randn(1, 61, K)}, r"x must have two dimensions, got shape \[1, 61, 96\]"),
        ({"A": torch.randn(4, R, K)}, r"A must have shape \[5, R, in_features = 96\]"),
        ({"B": torch.randn(5, R, N)}, r"B must have shape \[5, 64, 4\], got \[5, 4, 64\]"),
    ],
)
def test_bad_arguments_are_refused_with_the_values(change, message) -> None:
    p = replace(problem(), **change)
    with pytest.raises(RuntimeError, match=message):
        grouped_lora_linear(p.x, p.packed, p.offsets, p.A, p.B, 0.5)
    if "offsets[" in message.replace("\\", "") or "must end" in message:
        return  # found in the data alone
    meta = [t.to("meta") for t in (p.x, *p.packed[:3], p.offsets, p.A, p.B)]
    with pytest.raises(RuntimeError, match=message):
        ops.grouped_lora_linear(*meta, None, 0.5, 0.0, *p.packed[3:])
