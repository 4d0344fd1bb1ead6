"""LoRA fine-tuning with the ops alone, in plain PyTorch: eager, then under torch.compile.

A small network is quantized to 4 bits; its adapters learn a task that it was not made for.
"""

import torch
from torch import nn

import hqqlora.autograd
from hqqlora.ops import PackedWeight


class LoRALayer(nn.Module):
    """y = x W^T + scaling * (x A^T) B^T, with W frozen in 4 bits, in groups of 64."""

    def __init__(self, weight: torch.Tensor, rank: int = 8, scaling: float = 2.0) -> None:
        super().__init__()
        nbits, group_size, axis = 4, 64, 1
        packed = torch.ops.hqqlora.quantize(
            weight.detach(), nbits, group_size, axis, torch.float32
        )
        self.weight = PackedWeight(*packed, *weight.shape, nbits, group_size, axis)
        self.scaling = scaling
        self.A = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return hqqlora.autograd.lora_linear(x, self.weight, None, self.A, self.B, self.scaling)


def train(compiled: bool, steps: int = 40) -> list[float]:
    """The loss of each step."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Linear(128, 256, bias=False), nn.GELU(), nn.Linear(256, 128, bias=False)
    )
    change = torch.randn(128, 2) @ torch.randn(2, 128) / 16  # of rank 2
    model = nn.Sequential(LoRALayer(dense[0].weight), dense[1], LoRALayer(dense[2].weight))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)  # A and B: all that trains
    forward = torch.compile(model, fullgraph=True) if compiled else model
    losses = []
    for _ in range(steps):
        x = torch.randn(256, 128)
        target = dense(x).detach() + x @ change
        loss = nn.functional.mse_loss(forward(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("step    eager  compiled")
    for step, losses in enumerate(zip(train(False), train(True), strict=True), start=1):
        if step == 1 or step % 5 == 0:
            print("{:4d}  {:7.4f}  {:8.4f}".format(step, *losses))
