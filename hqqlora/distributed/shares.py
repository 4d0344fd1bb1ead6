"""Which part of a parameter a rank holds, and how parts get to their ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True)
class Share:
    """What this rank holds of a parameter: the indices `start` to `stop` of dimension `dim`.

    Parts are those of torch.chunk: of equal size, but for the last ones, which may be smaller
    or empty. `group` is of the ranks that have the parts; None if this one has the whole.
    """

    local: Tensor
    shape: torch.Size
    dim: int
    start: int
    stop: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, parameter: Tensor, name: str) -> Share:
        """The share of a DTensor that fully_shard has made, or of a plain tensor.

        Raises:
            ValueError: the tensor is divided in another way.
        """
        shape = parameter.shape
        if not isinstance(parameter, DTensor):
            return cls(parameter.detach(), shape, 0, 0, shape[0] if shape else 1, None)
        sharded = [
            (i, p) for i, p in enumerate(parameter.placements) if not isinstance(p, Replicate)
        ]
        mesh_dim, placement = sharded[0] if len(sharded) == 1 else (0, None)
        # (A subclass of Shard divides in another way.)
        if not isinstance(placement, Shard) or type(placement) is not Shard:
            raise ValueError(
                f"{name} is divided as {parameter.placements}: only what fully_shard does over "
                f"one dimension of a mesh can be loaded"
            )
        mesh = parameter.device_mesh
        dim, ranks = placement.dim, mesh.size(mesh_dim)
        step = -(-shape[dim] // ranks)
        start = min(step * mesh.get_local_rank(mesh_dim), shape[dim])
        stop = min(start + step, shape[dim])
        local = parameter.to_local().detach()
        return cls(local, shape, dim, start, stop, mesh.get_group(mesh_dim))

    def fill(self, part: Tensor) -> None:
        """Copies this rank's part, converted to the parameter's dtype."""
        self.local.copy_(part)

    def receive(self, whole: Tensor | None, source: int, device: torch.device) -> None:
        """Gives each rank of the group its part of `whole`, which rank `source` of the group
        has (the others pass None). All ranks of the group call this.

        device: where the group communicates; the parameter may be elsewhere (CPU offload).
        """
        if self.group is None:
            assert whole is not None
            self.fill(whole)
            return
        ranks = dist.get_world_size(self.group)
        step = -(-self.shape[self.dim] // ranks)
        padded = list(self.shape)
        padded[self.dim] = step
        # As bytes: not every backend has every dtype.
        part = torch.zeros(padded, dtype=self.local.dtype, device=device)
        parts = None
        if whole is not None:
            whole = whole.detach().to(device, self.local.dtype)
            parts = [torch.zeros_like(part) for _ in range(ranks)]
            for padded_part, piece in zip(
                parts, torch.split(whole, step, self.dim), strict=False
            ):
                padded_part.narrow(self.dim, 0, piece.size(self.dim)).copy_(piece)
            parts = [padded_part.view(torch.uint8) for padded_part in parts]
        dist.scatter(part.view(torch.uint8), parts, group=self.group, group_src=source)
        self.fill(part.narrow(self.dim, 0, self.stop - self.start))


def communication_device(model: nn.Module) -> torch.device:
    """Where the ranks that share `model` communicate: the device of their mesh."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            kind = parameter.device_mesh.device_type
            module = torch.get_device_module(kind)
            return torch.device(kind if kind == "cpu" else f"{kind}:{module.current_device()}")
    return torch.device("cpu")
