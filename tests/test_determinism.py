"""docs/determinism.md, row by row: what gives the same bits, and what the same numbers within
the bounds of the float64 oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import c_library
import determinism_results
import pytest
import torch
from backends import ISAS, CpuOps, EmulatedOps
from determinism_results import K, everything, of_formats, of_products, products
from oracle import FLOATING, random_weight
from product import RESULTS, random_product
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hqqlora import BaseQuantizeConfig, HQQLinear, LoRALinear

ops = torch.ops.hqqlora
HERE = c_library.library().hqq_isa_in_use(None)
INSTRUCTION_SETS = [name for name, number in ISAS.items() if 0 < number <= HERE]
# The products with the frozen weight, which the caller's GEMM may serve.
BASE = ("y", "dx", "y with LoRA", "dx with LoRA")

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, value in expected.items():
        assert value.isfinite().all(), name
        assert torch.equal(found[name], value), name


def assert_within_bounds(found: dict[str, Tensor], other: dict[str, Tensor]) -> int:
    """Two results of one product differ by twice the oracle's bound at most; the number of
    tensors whose bits differ."""
    differing = 0
    for name, product in products().items():
        for result, (_, bound) in zip(RESULTS, product.expected(), strict=True):
            left, right = (results[f"{name}: {result}"] for results in (found, other))
            assert ((left.double() - right.double()).abs() <= 2 * bound).all(), (name, result)
            differing += not torch.equal(left, right)
    return differing


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return everything()


# ---- the same machine ----------------------------------------------------------------------


def test_a_call_repeats(expected) -> None:
    assert_same_bits(everything(), expected)


def test_one_thread_and_two(expected) -> None:
    """Where a product falls to torch's GEMM (the "blocked" kernel: never with AVX2), its last
    bits are torch's."""
    torch.set_num_threads(2)
    try:
        found = everything()
    finally:
        torch.set_num_threads(1)
    assert_within_bounds(found, expected)
    ours = dict(expected)
    for name, product in products().items():
        dtype, M = product.x.dtype, len(product.x)
        for result in BASE:
            kernel = CpuOps().chosen(product.weight.packed, M, dtype, result.startswith("dx"))
            if kernel == "blocked":
                del found[f"{name}: {result}"], ours[f"{name}: {result}"]
    assert_same_bits(found, ours)


def test_torchs_switch_for_deterministic_algorithms_changes_nothing(expected) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_bits(everything(), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", FLOATING)
def test_rows_alone_and_among_others(dtype) -> None:
    """The number of rows chooses the kernel: the same numbers, other bits."""
    weight = random_weight(192, 320, 64)
    many = random_product(weight, 40, 4, dtype, torch.float32, 0.0, seed=3)
    _, bound = many.expected()[0]
    together = many.linear(ops)
    alone = torch.cat(
        [ops.linear(x, *many.packed, None, *many.numbers) for x in many.x[:, None]]
    )
    assert ((alone.double() - together.double()).abs() <= 2 * bound).all()
    assert dtype != torch.float32 or not torch.equal(alone, together)  # the test can tell


# ---- other instruction sets and processes --------------------------------------------------


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_formats_have_the_same_bits_with_every_instruction_set(isa) -> None:
    """Codes, scales and zeros of every solver, dequantized weights, dropout's masks."""
    assert_same_bits(of_formats(CpuOps(isa=isa)), of_formats(ops))


def test_cuda_kernels_give_formats_the_bits_of_the_cpu() -> None:
    """By the emulator, which contracts nothing (nvcc: -fmad=false for the quantizer)."""
    assert_same_bits(of_formats(EmulatedOps()), of_formats(ops))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_the_reference_kernel_has_the_same_bits_with_every_instruction_set(isa) -> None:
    found = of_products(CpuOps("reference", isa), rows=(4,))
    assert_same_bits(found, of_products(CpuOps("reference"), rows=(4,)))


@pytest.mark.parametrize("kernel", ["auto", "direct", "tiled", "blocked"])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_products_are_the_same_within_bounds_with_every_instruction_set(isa, kernel) -> None:
    portable = of_products(CpuOps(kernel, "portable"))
    found = of_products(CpuOps(kernel, isa))
    assert (assert_within_bounds(found, portable) > 0) == (isa != "portable")


def test_another_process_and_one_without_vectors(expected, tmp_path: Path) -> None:
    """HQQLORA_ISA of the environment caps the instruction set of the torch ops."""
    script = Path(determinism_results.__file__)
    runs = {}
    for isa in ("", "portable"):
        environment = os.environ | {"HQQLORA_ISA": isa, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, script, tmp_path / f"results{isa}.pt"]
        runs[isa] = subprocess.Popen(command, env=environment)
    assert [run.wait(120) for run in runs.values()] == [0, 0]
    same, portable = (torch.load(tmp_path / f"results{isa}.pt") for isa in runs)
    assert_same_bits(same, expected)
    assert assert_within_bounds(portable, expected) > 0
    formats = of_formats(ops).keys()
    assert_same_bits({n: portable[n] for n in formats}, {n: expected[n] for n in formats})


# ---- seeds, compiled graphs, checkpointing -------------------------------------------------


def model() -> nn.Module:
    torch.manual_seed(1)
    config = BaseQuantizeConfig(nbits=4, group_size=64)
    layers = []
    for _ in range(2):
        base = HQQLinear(nn.Linear(K, K), config, compute_dtype=torch.float32)
        layer = LoRALinear(base, r=4, lora_dropout=0.2, init_lora_weights=False)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers)


def step(run, parameters: list[Tensor], seed: int) -> dict[str, Tensor]:
    """y and the gradients of one training step with the masks of a seed."""
    torch.manual_seed(2)
    x = torch.randn(24, K)
    torch.manual_seed(seed)
    y = run(x)
    gradients = torch.autograd.grad(y.square().sum(), parameters)
    return {"y": y.detach()} | {f"gradient {i}": g for i, g in enumerate(gradients)}


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[Tensor]]:
    network = model().train()
    return network, [p for p in network.parameters() if p.requires_grad]


def test_torchs_seed_decides_the_dropout_masks(trained) -> None:
    network, parameters = trained
    first = step(network, parameters, 3)
    assert_same_bits(step(network, parameters, 3), first)
    assert not torch.equal(step(network, parameters, 4)["y"], first["y"])


def test_a_layer_quantized_again_is_the_same(trained) -> None:
    network, _ = trained
    for name, value in model().state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name


def test_activation_checkpointing_changes_no_bit(trained) -> None:
    network, parameters = trained

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(network, x, use_reentrant=False)

    assert_same_bits(step(checkpointed, parameters, 3), step(network, parameters, 3))


def test_a_compiled_graph_changes_no_bit_of_the_ops(trained) -> None:
    """Traced by dynamo and AOTAutograd, without inductor's own code for what is between."""
    network, parameters = trained
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    assert_same_bits(step(compiled, parameters, 3), step(network, parameters, 3))
    torch._dynamo.reset()
