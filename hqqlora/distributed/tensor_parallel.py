"""Tensor parallelism: quantized layers, with and without an adapter, cut over the ranks.

For torch's own `parallelize_module`. `ColwiseParallel` and `RowwiseParallel` here are torch's,
which cannot cut a packed weight, and do for quantized layers what those do for dense ones::

    parallelize_module(model, mesh, {
        "model.layers.*.self_attn.q_proj": hqqlora.distributed.ColwiseParallel(),
        "model.layers.*.self_attn.o_proj": hqqlora.distributed.RowwiseParallel(),
        ...
    })

A rank then holds, with T ranks (C: column-wise, R: row-wise):

- of the weight, N/T rows (C) or K/T columns (R), as a packed weight of its own (`repacking`);
- of the adapter, A [R, K] whole and N/T rows of B (C), or K/T columns of A and B whole (R), as
  DTensors, so that optimizers, clip_grad_norm_ and torch.distributed.checkpoint know;
- of a bias, N/T elements (C) or all of it (R), to be added once, to the sum over the ranks.

Base and adapter are one product on each rank. Its one collective is torch's: of y (R), or of
dx (C); besides, the gradient of the factor that every rank holds whole is summed over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor import distribute_tensor as distribute
from torch.distributed.tensor.parallel import ColwiseParallel as TorchColwise
from torch.distributed.tensor.parallel import RowwiseParallel as TorchRowwise

from hqqlora.config import QuantSettings
from hqqlora.distributed.adapter_factors import Factor, factors_of
from hqqlora.linear import HQQLinear
from hqqlora.ops import PackedWeight
from hqqlora.ops.weight import is_planes
from hqqlora.repacking import part_group_size, take_columns, take_rows
from hqqlora.state_encoding import LayerMetadata

# Of the weight [N, K]: column-wise parallelism (of W^T) cuts rows, as torch has it.
ROWS, COLUMNS = 0, 1


class ColwiseParallel(TorchColwise):
    """torch's, with the same arguments, for quantized layers too: the out_features are cut.

    x is replicated, y sharded along its last dimension, unless the layouts say otherwise.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _apply(self, super()._apply, module, device_mesh, ROWS)


class RowwiseParallel(TorchRowwise):
    """torch's, with the same arguments, for quantized layers too: the in_features are cut.

    x is sharded along its last dimension, y replicated, unless the layouts say otherwise.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.desired_input_layouts: tuple[Placement, ...] = (Shard(-1),)
        return _apply(self, super()._apply, module, device_mesh, COLUMNS)


@dataclass(frozen=True)
class WeightPart:
    """Which part of which weight an `HQQLinear` holds."""

    mesh: DeviceMesh
    dim: int
    whole: LayerMetadata

    def range_of(self, rank: int) -> range:
        """The rows or columns of a rank of the mesh: torch's rule for DTensors."""
        sides = (self.whole.out_features, self.whole.in_features)
        return _chunk(sides[self.dim], self.mesh.size(), rank)


def _chunk(side: int, ranks: int, rank: int) -> range:
    each = -(-side // ranks)
    return range(min(rank * each, side), min((rank + 1) * each, side))


def _apply(
    style: TorchColwise | TorchRowwise,
    torch_apply: Callable[[nn.Module, DeviceMesh], nn.Module],
    module: nn.Module,
    mesh: DeviceMesh,
    dim: int,
) -> nn.Module:
    base = module if isinstance(module, HQQLinear) else getattr(module, "base_layer", None)
    if not isinstance(base, HQQLinear):
        return torch_apply(module, mesh)
    if mesh.ndim != 1:
        raise ValueError(f"tensor parallelism needs a mesh of one dimension, not {mesh}")
    if base.weight_part is not None:
        raise ValueError("the layer is tensor-parallel already")
    factors = factors_of(module, dim)
    _check_parts(base, mesh, dim)  # on every rank alike, before anything is changed
    _cut_weight(base, mesh, dim, style.src_data_rank)
    for factor in factors:
        _distribute(factor, mesh, style.src_data_rank)
    parallel = cast(_TensorParallel, module)
    parallel._run = _Run(style, mesh, dim, tuple(factors), base)
    kind = type(module)
    module.__class__ = type(f"TensorParallel{kind.__name__}", (_TensorParallel, kind), {})
    return module


# ---- cutting -----------------------------------------------------------------------------


def _check_parts(base: HQQLinear, mesh: DeviceMesh, dim: int) -> None:
    """Raises ValueError where a rank would get nothing, or a part that cannot be."""
    part = WeightPart(mesh, dim, base.metadata)
    N, K = base.out_features, base.in_features
    for rank in range(mesh.size()):
        piece = part.range_of(rank)
        if not piece:
            raise ValueError(f"[{N}, {K}] weight: dimension {dim} has nothing for rank {rank}")
        rows, columns = (piece, range(K)) if dim == ROWS else (range(N), piece)
        part_group_size(base.packed, rows, columns)


def _cut_weight(base: HQQLinear, mesh: DeviceMesh, dim: int, source: int | None) -> None:
    """Leaves of the base what is this rank's, of the weight that rank `source` has (None: that
    each has)."""
    whole = WeightPart(mesh, dim, base.metadata)
    piece = whole.range_of(mesh.get_local_rank())
    planes = is_planes(base.W_q, base.nbits)
    base.repack(planes=False)
    if source is not None:
        for tensor in (base.W_q, base.scale, base.zero, base.bias):
            if tensor is not None:
                broadcast(tensor, mesh, source)
    take = take_rows if dim == ROWS else take_columns
    put_weight(base, take(base.packed, piece.start, piece.stop))
    base.repack(planes)
    if dim == ROWS and base.bias is not None:
        mine = base.bias.detach()[piece.start : piece.stop].clone()
        base.bias = nn.Parameter(mine, requires_grad=base.bias.requires_grad)
    base.weight_part = whole


def put_weight(
    layer: HQQLinear, weight: PackedWeight, settings: QuantSettings | None = None
) -> None:
    """Gives a layer another weight, of another shape. Its settings (None: as they were) but for
    what depends on the shape."""
    for name in ("W_q", "scale", "zero"):
        tensor = getattr(weight, name)
        layer._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    metadata = replace(
        layer.metadata,
        settings=settings
        or replace(layer.metadata.settings, group_size=weight.group_size, view_as_float=False),
        out_features=weight.out_features,
        in_features=weight.in_features,
    )
    layer._allocate(metadata, weight.scale.dtype, weight.scale.device, bias=False)


def broadcast(tensor: Tensor, mesh: DeviceMesh, source: int) -> None:
    """Brings a tensor of any dtype from a rank of the mesh to all."""
    content = tensor.detach()
    dense = content.contiguous()
    dist.broadcast(dense.view(torch.uint8), group=mesh.get_group(), group_src=source)
    if dense is not content:
        content.copy_(dense)


def _distribute(factor: Factor, mesh: DeviceMesh, source: int | None) -> None:
    held = factor.parameter
    placement = Replicate() if factor.dim is None else Shard(factor.dim)
    shared = distribute(held.detach(), mesh, [placement], src_data_rank=source)
    factor.put(nn.Parameter(shared, requires_grad=held.requires_grad))


# ---- running -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """What a tensor-parallel layer needs to run."""

    style: TorchColwise | TorchRowwise
    mesh: DeviceMesh
    dim: int
    factors: tuple[Factor, ...]
    base: HQQLinear

    def __deepcopy__(self, memo: dict[int, Any]) -> _Run:
        raise TypeError("a tensor-parallel layer cannot be copied")

    def local_input(self, module: nn.Module, x: Tensor) -> Tensor:
        style: Any = self.style
        shared = style._prepare_input_fn(
            style.input_layouts, style.desired_input_layouts, module, (x,), self.mesh
        )
        if self.dim == COLUMNS:
            return cast(Tensor, shared.to_local())
        # Each rank has the gradient through its own rows: a part of the sum.
        return cast(Tensor, shared.to_local(grad_placements=[Partial()]))

    def output(self, module: nn.Module, y: Tensor, bias: DTensor | None) -> Tensor:
        style: Any = self.style
        shape = y.shape
        placement: Placement = Partial()
        if self.dim == ROWS:
            placement = Shard(-1)
            part = self.base.weight_part
            assert part is not None
            shape = torch.Size((*y.shape[:-1], part.whole.out_features))
        stride = torch.empty(shape, device="meta").stride()
        shared = DTensor.from_local(
            y, self.mesh, [placement], run_check=False, shape=shape, stride=stride
        )
        if bias is None:
            ready = style._prepare_output_fn(
                style.output_layouts, style.use_local_output, module, shared, self.mesh
            )
            return cast(Tensor, ready)
        summed = style._prepare_output_fn(
            style.output_layouts, False, module, shared, self.mesh
        )
        total = (summed + bias).to(y.dtype)
        return cast(Tensor, total.to_local() if style.use_local_output else total)

    @contextmanager
    def local_parameters(self) -> Iterator[None]:
        """Each factor as the tensor that is this rank's. Row-wise, without the biases."""
        held = [(factor, factor.parameter) for factor in self.factors]
        bias = self.base._parameters["bias"]
        try:
            for factor, parameter in held:
                factor.put(None if self._is_late(factor) else _local(parameter, factor.dim))
            if self.dim == COLUMNS:
                self.base._parameters["bias"] = None
            yield
        finally:
            for factor, parameter in held:
                factor.put(parameter)
            self.base._parameters["bias"] = bias

    def _is_late(self, factor: Factor) -> bool:
        return factor.is_bias and self.dim == COLUMNS

    def late_bias(self) -> DTensor | None:
        """Row-wise: what is to be added to the sum over the ranks, replicated."""
        if self.dim == ROWS:
            return None
        total: Any = None
        if self.base.bias is not None:
            total = DTensor.from_local(
                self.base.bias, self.mesh, [Replicate()], run_check=False
            )
        for factor in self.factors:
            scaling = factor.scaling() if factor.is_bias else 0.0
            if scaling:
                # redistribute: its backward sums what the ranks add to the gradient
                own: Any = cast(Any, factor.parameter).redistribute(placements=[Replicate()])
                own = own.float() * scaling
                total = own if total is None else total.float() + own
        return cast("DTensor | None", total)

    def randomness(
        self, module: nn.Module, device: torch.device
    ) -> AbstractContextManager[None]:
        """Column-wise, ranks of the same seed drop the same elements of the x they share;
        row-wise each draws for its own columns."""
        if self.dim == ROWS or not module.training:
            return nullcontext()
        return _random_numbers_of(self.mesh.get_local_rank(), device)


def _local(parameter: nn.Parameter, dim: int | None) -> Tensor:
    shared = cast(Any, parameter)
    if dim is not None:
        return cast(Tensor, shared.to_local())
    # Every rank has a part of the gradient's sum; the backward of redistribute sums them.
    whole = shared.redistribute(placements=[Replicate()])
    return cast(Tensor, whole.to_local(grad_placements=[Partial()]))


@contextmanager
def _random_numbers_of(rank: int, device: torch.device) -> Iterator[None]:
    """Lets torch's generator of the device of x, from which masks' seeds are drawn, go on as it
    would on any rank, but give numbers of this rank's own meanwhile. They begin with a number
    from the CPU's generator, which nothing has to wait for."""
    seed = int(torch.randint(2**62, (1,), device="cpu"))
    generator = _generator_of(device)
    state = generator.get_state()
    generator.manual_seed(seed + rank)
    try:
        yield
    finally:
        generator.set_state(state)


def _generator_of(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return torch.cuda.default_generators[device.index]


class _TensorParallel(nn.Module):
    """What `parallelize_module` adds to the class of a layer."""

    _run: _Run

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y as the style's layouts have it."""
        run = self._run
        bias = run.late_bias()
        local = run.local_input(self, x)
        with run.local_parameters(), run.randomness(self, local.device):
            y = super().forward(local, *args, **kwargs)
        return run.output(self, y, bias)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "a tensor-parallel layer cannot be merged, requantized or given another adapter: "
            "do that before parallelize_module, or to a model loaded from full_state_dict"
        )

    merge = requantize = update_layer = to_dense = _refuse
