"""Predictions for real layers: every shape, number of tokens, pass and axis, every device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from . import large, rivals, small, wide
from .assumptions import DEVICES, Device
from .large import Dequantize
from .launches import Launches, Plan, Product
from .lora import Lora
from .small import Instance
from .toolchain import Kernel
from .wide import Wide

# (N, K) of Llama 3's layers: q and o; k and v; gate and up; down.
SHAPES = {
    "8B": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "70B": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
}
ROWS = (1, 8, 16, 64, 512, 4096)
STEP_ROWS = (4096, 16384)
OPERATIONS = ("linear", "linear_dgrad")
AXES = (1, 0)
Prediction = dict[str, Any]


def is_big(N: int, K: int) -> bool:
    """Layers that hold most of a model's weights: from 8B's up and down projections on."""
    return N * K >= 4096 * 14336


class Predictor:
    """One device, and the kernels that were compiled for it."""

    def __init__(self, device: Device, kernels: Sequence[Kernel], launches: Launches) -> None:
        self.device = device
        self.launches = launches
        self.small: dict[tuple[int, int, int, int], tuple[Kernel, Instance]] = {}
        self.dequantize: dict[tuple[int, int], Dequantize] = {}
        self.wide: dict[tuple[int, int, int], Wide] = {}
        self.lora = Lora.of(kernels)
        for kernel in kernels:
            instance = Instance.parse(kernel.name)
            if instance and instance.dtype == "__nv_bfloat16":
                key = (instance.nbits, instance.transpose, instance.axis, instance.tokens)
                self.small[key] = (kernel, instance)
            many = Wide.of(kernel)
            if many and many.dtype == "__nv_bfloat16":
                self.wide[many.nbits, many.transpose, many.tokens] = many
            dequantize = Dequantize.of(kernel)
            if dequantize and "__nv_bfloat16" in kernel.name:
                self.dequantize[dequantize.nbits, dequantize.axis] = dequantize

    def product(self, plan: Plan, p: Product) -> Prediction:
        if plan.small:
            key = (p.nbits, p.transpose, p.axis, plan.tokens)
            kernel, instance = self.small[key]
            launch = self.launches.of(kernel.name)
            assert launch, kernel.name
            shared = launch.dynamic_shared_bytes(plan.ways)
            b = small.bounds(self.device, kernel, instance, shared, plan, p)
            roofline = small.roofline(self.device, p)
            return {
                "kernel": f"small, {plan.tokens} tokens, {plan.ways} x {plan.splits} parts"
                + (", paired" if plan.paired else ""),
                "seconds": b.predicted,
                "bound_by": b.longest,
                "roofline_seconds": roofline,
                "times_roofline": b.bound / roofline,
                "parts": b.seconds | {"launches": b.launches, "tail": b.tail},
            }
        if plan.wide:
            many = self.wide[p.nbits, p.transpose, plan.wide_tokens]
            w = wide.bounds(self.device, many, plan, p)
            roofline = wide.roofline(self.device, plan, p)
            return {
                "kernel": f"wide, {plan.wide_tokens} tokens, {plan.wide_splits} splits"
                + (", a cluster" if plan.wide_cluster else ""),
                "seconds": w.predicted,
                "bound_by": w.longest,
                "roofline_seconds": roofline,
                "times_roofline": w.bound / roofline,
                "parts": w.parts,
            }
        d = self.dequantize[p.nbits, p.axis]
        seconds = large.product_seconds(self.device, d, plan, p)
        roofline = large.roofline(self.device, p)
        return {
            "kernel": f"blocks of {plan.width}",
            "seconds": seconds,
            "bound_by": "dequantize + GEMM",
            "roofline_seconds": roofline,
            "times_roofline": seconds / roofline,
            "parts": {},
        }

    def against_rivals(self, p: Product, seconds: float) -> Prediction:
        dense = rivals.dense(self.device, p.M, p.outputs, p.length)
        hqq = rivals.hqq(self.device, p.M, p.outputs, p.length)
        return {
            "dense_seconds": dense,
            "hqq_seconds": hqq,
            "times_dense": dense / seconds,
            "times_hqq": hqq / seconds,
        }

    def products(self, products: Sequence[Product]) -> Iterable[Prediction]:
        plans = self.launches.plans(self.device, products)
        for p in products:
            found = self.product(plans[p], p)
            labels = self.labels(p, OPERATIONS[p.transpose])
            yield labels | found | self.against_rivals(p, found["seconds"])

    def steps(self, pairs: Sequence[tuple[Product, Product]]) -> Iterable[Prediction]:
        """Forward and backward with LoRA."""
        plans = self.launches.plans(self.device, [p for pair in pairs for p in pair])
        for forward, dgrad in pairs:
            both = [(plans[p], p) for p in (forward, dgrad)]
            parts = [self.product(plan, p)["seconds"] for plan, p in both]
            seconds = large.lora_step_seconds(self.device, self.lora, parts[0], parts[1], both)
            dense = rivals.dense_lora_step(self.device, forward.M, forward.N, forward.K)
            hqq = dense + sum(
                rivals.hqq(self.device, p.M, p.outputs, p.length)
                - rivals.dense(self.device, p.M, p.outputs, p.length)
                for p in (forward, dgrad)
            )
            yield self.labels(forward, "lora_step") | {
                "kernel": ", ".join(
                    "wide" if plan.wide else f"blocks of {plan.width}" for plan, _ in both
                ),
                "seconds": seconds,
                "bound_by": "",
                "dense_seconds": dense,
                "hqq_seconds": hqq,
                "times_dense": dense / seconds,
                "times_hqq": hqq / seconds,
            }

    def labels(self, p: Product, operation: str) -> Prediction:
        shape = (p.N, p.K)
        return {
            "device": self.device.name,
            "operation": operation,
            "axis": p.axis,
            "N": p.N,
            "K": p.K,
            "M": p.M,
            "model": next(m for m, shapes in SHAPES.items() if shape in shapes),
            "big": is_big(*shape),
        }


def predict(kernels: Sequence[Kernel], launches: Launches) -> list[Prediction]:
    """For each device whose architecture was compiled for; sm_89 may run sm_80's code."""
    shapes = [shape for model in SHAPES.values() for shape in model]
    products = [
        Product(N, K, M, transpose, axis)
        for N, K in shapes
        for transpose in (0, 1)
        for axis in AXES
        for M in ROWS
    ]
    pairs = [
        (Product(N, K, M, 0, axis), Product(N, K, M, 1, axis))
        for N, K in shapes
        for axis in AXES
        for M in STEP_ROWS
    ]
    found: list[Prediction] = []
    for device in DEVICES:
        code = [k for k in kernels if k.arch == _code_for(device.arch, kernels)]
        if code:
            predictor = Predictor(device, code, launches)
            found += predictor.products(products)
            found += predictor.steps(pairs)
    return found


def _code_for(arch: str, kernels: Sequence[Kernel]) -> str | None:
    """The newest compiled architecture of the same generation that is not newer."""
    compiled = {k.arch for k in kernels}
    same = [a for a in compiled if a[:-1] == arch[:-1] and a <= arch]
    return max(same, default=None)
