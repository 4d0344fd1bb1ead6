"""What four processes check about tensor-parallel layers, each check in all of them at once;
see `distributed_processes`. test_distributed.py has one test for each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import Oracle, as_rows, assert_close, product_bound, summation
from peft_models import relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel as TorchColwise
from torch.distributed.tensor.parallel import RowwiseParallel as TorchRowwise
from torch.distributed.tensor.parallel import parallelize_module

import hqqlora
from hqqlora import BaseQuantizeConfig, HQQLinear, LoRALinear
from hqqlora.distributed import ColwiseParallel, RowwiseParallel, full_state_dict

COLUMN, ROW = ColwiseParallel, RowwiseParallel
M = 6


@cache
def meshes() -> tuple[DeviceMesh, DeviceMesh]:
    """One of all four ranks, and one of this rank and a neighbour."""
    return init_device_mesh("cpu", (4,)), init_device_mesh(
        "cpu", (2, 2), mesh_dim_names=("data", "tensor")
    )["tensor"]


def layer_of(N: int, K: int, G: int, axis: int = 1, nbits: int = 4, bias: bool = True) -> Any:
    """A quantized layer, the same on every rank."""
    torch.manual_seed(N + K)
    dense = nn.Linear(K, N, bias)
    config = BaseQuantizeConfig(nbits=nbits, group_size=G, axis=axis)
    return HQQLinear(dense, config, compute_dtype=torch.float32)


def adapted(base: HQQLinear, **options: Any) -> LoRALinear:
    torch.manual_seed(1)
    layer = LoRALinear(base, r=4, lora_bias=True, init_lora_weights=False, **options)
    nn.init.normal_(layer.lora_bias)
    return layer


def input_of(K: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, M // 2, K, generator=generator)


def piece(whole: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """This rank's chunk."""
    return whole.chunk(mesh.size(), dim)[mesh.get_local_rank()]


def on_all_ranks_the_same(tensor: Tensor, mesh: DeviceMesh) -> None:
    first = tensor.detach().clone()
    dist.broadcast(first, group=mesh.get_group(), group_src=0)
    assert torch.equal(first, tensor)


def sum_bound(mesh: DeviceMesh, x: Tensor, exact: Tensor, layer: Any, dgrad: bool) -> Tensor:
    """`product_bound` of each rank's part together is the whole's and the roundings of parts
    and sums, each half a unit in the last place of what is no larger than |x| |W|^T."""
    W, magnitude = oracle_of(layer).W, oracle_of(layer).magnitude
    if dgrad:
        W, magnitude = W.T, magnitude.T
    largest = as_rows(x).double().abs() @ (W.abs() + magnitude).T
    bound = product_bound(as_rows(x), exact, W, magnitude, 0.0)
    return bound + 2 * mesh.size() * 2.0**-24 * (largest + 1)


def oracle_of(layer: HQQLinear) -> Oracle:
    return Oracle(layer.packed)


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert type(found[key]) is type(tensor), key
        assert found[key].dtype == tensor.dtype, key
        view = torch.int16 if tensor.dtype == torch.float16 else tensor.dtype
        assert torch.equal(found[key].view(view), tensor.view(view)), key


# ---- the checks --------------------------------------------------------------------------

FORMATS = [  # the axis, bits, and group size of a [24, 64] weight, cut either way
    (1, 4, 16),
    (1, 3, 16),
    (1, 8, 64),  # one group a row
    (1, 2, 16),
    (0, 4, 12),
    (0, 1, 24),  # one group a column
]


def layers_column_wise(folder: Path) -> None:
    for mesh in meshes():
        for axis, nbits, G in FORMATS:
            whole = layer_of(24, 64, G, axis, nbits)
            layer = copy.deepcopy(whole)
            assert parallelize_module(layer, mesh, COLUMN()) is layer
            if (nbits, axis) == (4, 1):  # (others may have words with empty slots)
                assert layer.W_q.numel() * mesh.size() == whole.W_q.numel()
            x = input_of(64).requires_grad_()
            y = layer(x)
            exact = as_rows(x).double() @ oracle_of(whole).W.T + whole.bias.double()
            bound = sum_bound(mesh, x.detach(), exact, whole, False)
            assert y.shape == (2, M // 2, 24 // mesh.size())
            assert_close(as_rows(y), piece(exact, mesh, 1), piece(bound, mesh, 1))
            dy = torch.randn(M, 24, generator=torch.Generator().manual_seed(3))
            y.backward(piece(dy, mesh, 1).view_as(y))
            exact = dy.double() @ oracle_of(whole).W
            assert_close(as_rows(x.grad), exact, sum_bound(mesh, dy, exact, whole, True))
            on_all_ranks_the_same(x.grad, mesh)


def layers_row_wise(folder: Path) -> None:
    for mesh in meshes():
        for axis, nbits, G in FORMATS:
            whole = layer_of(24, 64, G, axis, nbits)
            layer = copy.deepcopy(whole)
            parallelize_module(layer, mesh, ROW())
            x = piece(input_of(64), mesh, 2).clone().requires_grad_()
            y = layer(x)
            rows = as_rows(input_of(64))
            exact = rows.double() @ oracle_of(whole).W.T + whole.bias.double()
            assert_close(as_rows(y), exact, sum_bound(mesh, rows, exact, whole, False))
            on_all_ranks_the_same(y, mesh)
            dy = torch.randn(M, 24, generator=torch.Generator().manual_seed(3))
            y.backward(dy.view_as(y))
            exact = dy.double() @ oracle_of(whole).W
            bound = sum_bound(mesh, dy, exact, whole, True)
            assert_close(as_rows(x.grad), piece(exact, mesh, 1), piece(bound, mesh, 1))


def adapters_either_way(folder: Path) -> None:
    """y, dx, dA, dB and the bias's gradient, against float64."""
    for mesh in meshes():
        for style, dim in ((COLUMN, 2), (ROW, 2)):
            whole = adapted(layer_of(24, 64, 16))
            layer = copy.deepcopy(whole)
            parallelize_module(layer, mesh, style())
            full = input_of(64)
            x = (piece(full, mesh, dim) if style is ROW else full).clone().requires_grad_()
            dy = torch.randn(2, M // 2, 24, generator=torch.Generator().manual_seed(3))
            y = layer(x)
            y.backward(piece(dy, mesh, dim) if style is COLUMN else dy)
            found = {name: p.grad.full_tensor() for name, p in trained(layer)}

            x64 = full.double().requires_grad_()
            A, B, b = (p.detach().double().requires_grad_() for _, p in trained(whole))
            W, s = oracle_of(whole.base_layer).W, whole.scaling
            exact = x64 @ W.T + whole.base_layer.bias.double() + s * (x64 @ A.T @ B.T + b)
            exact.backward(dy.double())
            # sums of up to M, N, K and R terms one in another, on every rank, then over ranks
            error = 4 * summation(64) + 4 * mesh.size() * 2.0**-24
            size = (
                full.abs().double() @ W.abs().T
                + 1
                + s * (full.abs().double() @ A.abs().T @ B.abs().T + b.abs())
            )
            size = size + full.abs().double() @ oracle_of(whole.base_layer).magnitude.T
            wanted = piece(exact, mesh, 2) if style is COLUMN else exact
            sized = piece(size, mesh, 2) if style is COLUMN else size
            assert_close(y, wanted, error * sized)
            dyb = dy.abs().double() @ B.abs()
            sizes = {
                "lora_A": s * as_rows(dyb).T @ as_rows(full.abs().double()),
                "lora_B": s
                * as_rows(dy.abs().double()).T
                @ as_rows(full.abs().double() @ A.abs().T),
                "lora_bias": s * as_rows(dy.abs().double()).sum(0),
            }
            for (name, gradient), factor in zip(found.items(), (A, B, b), strict=True):
                assert_close(gradient, factor.grad, error * sizes[name])
            size = dy.abs().double() @ (W.abs() + oracle_of(whole.base_layer).magnitude)
            size = size + s * dyb @ A.abs()
            wanted = piece(x64.grad, mesh, 2) if style is ROW else x64.grad
            assert_close(
                x.grad, wanted, error * (piece(size, mesh, 2) if style is ROW else size)
            )


def trained(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((n, p) for n, p in layer.named_parameters() if "lora_" in n)


def uneven_chunks(folder: Path) -> None:
    """10 rows on four ranks are 3, 3, 3 and 1, as torch cuts them; then joined again."""
    mesh = meshes()[0]
    whole = adapted(layer_of(10, 64, 16))
    layer = copy.deepcopy(whole)
    parallelize_module(layer, mesh, COLUMN(output_layouts=Replicate()))
    assert layer.out_features == (1 if mesh.get_local_rank() == 3 else 3)
    y = layer(input_of(64))
    assert relative_error(y, whole(input_of(64))) < 1e-6
    y.sum().backward()
    whole(input_of(64)).sum().backward()
    for (_, found), (_, wanted) in zip(trained(layer), trained(whole), strict=True):
        assert relative_error(found.grad.full_tensor(), wanted.grad) < 1e-6
    assert_same_state(full_state_dict(layer), whole.state_dict())


def dropout(folder: Path) -> None:
    for mesh in meshes():
        whole = adapted(layer_of(24, 64, 16), lora_dropout=0.5)
        column = copy.deepcopy(whole)
        parallelize_module(column, mesh, COLUMN(output_layouts=Replicate()))
        torch.manual_seed(5)
        expected = whole(input_of(64))
        torch.manual_seed(5)
        assert relative_error(column(input_of(64)), expected) < 1e-6

        # x of ones and A of ones: xa counts what was kept, each rank's of its own columns
        row = adapted(layer_of(24, 64, 16), lora_dropout=0.5)
        nn.init.ones_(row.lora_A)
        nn.init.ones_(row.lora_B)
        parallelize_module(row, mesh, ROW())
        ones = torch.ones(64, 64 // mesh.size())
        torch.manual_seed(5)
        row(ones)
        after = torch.rand(3)
        on_all_ranks_the_same(after, mesh)  # the generators have not come apart
        with seeds_drawn() as seeds:
            row(ones)
        column(input_of(64))
        mine = torch.stack(seeds)
        every = [torch.empty_like(mine) for _ in range(mesh.size())]
        dist.all_gather(every, mine, group=mesh.get_group())
        assert len({seed.item() for seed in every}) == mesh.size()
        row.eval()
        assert torch.equal(row(ones), row(ones))


@contextmanager
def seeds_drawn() -> Iterator[list[Tensor]]:
    """The seeds of the masks that are used meanwhile."""
    seeds: list[Tensor] = []
    operation = hqqlora.autograd.LoRALinear

    class Noting:
        @staticmethod
        def apply(*arguments: Any) -> Any:
            seeds.append(arguments[7])
            return operation.apply(*arguments)

    hqqlora.autograd.LoRALinear = Noting
    try:
        yield seeds
    finally:
        hqqlora.autograd.LoRALinear = operation


def layouts(folder: Path) -> None:
    """Sequence parallelism around a pair of layers: x and y cut along the sequence."""
    for mesh in meshes():
        up, down = adapted(layer_of(24, 64, 16)), adapted(layer_of(64, 24, 6))
        whole = nn.Sequential(up, nn.ReLU(), down)
        model = copy.deepcopy(whole)
        plan = {
            "0": COLUMN(input_layouts=Shard(1), use_local_output=True),
            "2": ROW(output_layouts=Shard(1), use_local_output=False),
        }
        parallelize_module(model, mesh, plan)
        full = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(4))
        x = piece(full, mesh, 1).clone().requires_grad_()
        y = model(x)
        assert isinstance(y, DTensor)
        full.requires_grad_()
        expected = whole(full)
        assert relative_error(y.full_tensor(), expected) < 1e-6
        y.full_tensor().pow(2).sum().backward()
        expected.pow(2).sum().backward()
        assert relative_error(x.grad, piece(full.grad, mesh, 1)) < 1e-6
        for (name, found), (_, wanted) in zip(trained(model), trained(whole), strict=True):
            assert relative_error(found.grad.full_tensor(), wanted.grad) < 1e-6, name


def the_first_rank_is_the_source(folder: Path) -> None:
    mesh = meshes()[0]
    torch.manual_seed(dist.get_rank())
    mine = adapted(layer_of(24, 64, 16))
    nn.init.normal_(mine.base_layer.bias)
    mine.base_layer.scale.data.mul_(1 + dist.get_rank())
    own, first = copy.deepcopy(mine), copy.deepcopy(mine)
    parallelize_module(first, mesh, COLUMN())
    parallelize_module(own, mesh, COLUMN(), src_data_rank=None)
    scale = piece(mine.base_layer.scale, mesh, 0)
    assert torch.equal(own.base_layer.scale, scale)
    assert torch.equal(first.base_layer.scale * (1 + dist.get_rank()), scale)
    gathered = full_state_dict(first)
    for key, tensor in gathered.items():
        on_all_ranks_the_same(tensor, mesh)
        if dist.get_rank() == 0:
            assert torch.equal(tensor, mine.state_dict()[key])


def refusals(folder: Path) -> None:
    mesh, pair = meshes()
    square = init_device_mesh("cpu", (2, 2))
    layer = adapted(layer_of(24, 64, 16))
    with pytest.raises(ValueError, match="a mesh of one dimension"):
        COLUMN()._apply(layer, square)
    with pytest.raises(ValueError, match=r"columns 0 to 40 of a \[24, 80\] .* multiples of 16"):
        parallelize_module(layer_of(24, 80, 16), pair, ROW())
    with pytest.raises(ValueError, match="nothing for rank 3"):
        parallelize_module(layer_of(3, 64, 16), mesh, COLUMN())
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    assert_same_state(layer.state_dict(), before)
    layer.merge()
    with pytest.raises(ValueError, match="unmerge it first"):
        parallelize_module(layer, pair, COLUMN())
    layer.unmerge()
    parallelize_module(layer, pair, COLUMN())
    with pytest.raises(ValueError, match="tensor-parallel already"):
        parallelize_module(layer, pair, COLUMN())
    with pytest.raises(RuntimeError, match="cannot be merged"):
        layer.merge()
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(layer)
    alone = layer_of(24, 64, 16)
    parallelize_module(alone, pair, COLUMN())
    with pytest.raises(ValueError, match="before parallelize_module"):
        LoRALinear(alone)


def torch_own_styles_refuse(folder: Path) -> None:
    """They would cut W_q across the rows it couples: an error, never wrong numbers."""
    column, row = layer_of(24, 64, 16), layer_of(24, 64, 16)
    parallelize_module(column, meshes()[1], TorchColwise())
    with pytest.raises(NotImplementedError, match="does not have a sharding strategy"):
        column(input_of(64))
    with pytest.raises(KeyError, match="weight"):
        parallelize_module(row, meshes()[1], TorchRowwise())


IN_FOUR: dict[str, Callable[[Path], None]] = {
    check.__name__: check
    for check in (
        layers_column_wise,
        layers_row_wise,
        adapters_either_way,
        uneven_chunks,
        dropout,
        layouts,
        the_first_rank_is_the_source,
        refusals,
        torch_own_styles_refuse,
    )
}
