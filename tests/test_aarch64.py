"""The C library on AArch64: cross-compiled here and run by qemu. Its own C tests hold it to
float64; here its results are compared with x86's, as docs/determinism.md states them.

`make aarch64` runs this, and all of the C tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from aarch64.results import Case, read_cases
from backends import ROOT, CpuOps
from product import RESULTS
from torch import Tensor

from hqqlora.ops import Solver

pytestmark = [pytest.mark.aarch64, pytest.mark.usefixtures("one_thread")]

# the quick ones, without those that multiply for long under qemu
C_TESTS = (
    "pack",
    "dequantize",
    "quantize_odd",
    "dropout",
    "lora",
    "blocked",
    "tiled",
    "grouped",
)
NAMES = dict(zip(RESULTS, ("y", "dx", "lora_y", "xa", "lora_dx", "dA", "dB"), strict=True))
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def run(*command: object) -> str:
    """Its output; the test fails with that where the command does."""
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        env=os.environ | {"PATH": PATH, "HQQLORA_TEST_QUICK": "1"},
    )
    text = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
    assert done.returncode == 0, f"{command}: {text[-3000:]}"
    return text


@pytest.fixture(scope="module")
def build() -> Path:
    """The library, C tests and results.c, built for AArch64."""
    needed = (
        "aarch64-linux-gnu-gcc",
        "aarch64-linux-gnu-g++",
        "qemu-aarch64",
        "cmake",
        "ninja",
    )
    missing = [tool for tool in needed if shutil.which(tool, path=PATH) is None]
    if missing:
        pytest.skip(
            f"no {', '.join(missing)} here (Debian: apt install g++-aarch64-linux-gnu "
            "qemu-user; cmake and ninja: make)"
        )
    folder = ROOT / "build" / "aarch64"
    toolchain = ROOT / "tests" / "aarch64" / "toolchain.cmake"
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_TOOLCHAIN_FILE={toolchain}",
        "-DHQQLORA_TORCH=OFF", "-DHQQLORA_CUDA=OFF")  # fmt: skip
    targets = ["aarch64_results", *(f"test_{name}" for name in C_TESTS)]
    run("cmake", "--build", folder, "--parallel", "2", "--target", *targets)
    return folder


@pytest.fixture(scope="module")
def cases(build: Path) -> list[Case]:
    program = build / "tests" / "aarch64" / "aarch64_results"
    machine = run("readelf", "-h", program)
    assert "AArch64" in machine
    emulator = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
    done = subprocess.run([*emulator, program], capture_output=True, check=True)
    return list(read_cases(done.stdout))


def test_the_c_tests_pass(build: Path) -> None:
    names = "|".join(C_TESTS)
    text = run("ctest", "--test-dir", build, "--output-on-failure", "-R", f"^({names})$")
    assert f"100% tests passed out of {len(C_TESTS)}" in text.replace("0 tests failed ", "")


def assert_same(found: Tensor, expected: Tensor, what: object) -> None:
    assert torch.equal(found, expected.reshape(-1)), what


def test_codes_scales_and_dequantized_weights_are_those_of_x86_bit_for_bit(cases) -> None:
    assert len(cases) == 60
    for case in cases:
        arrays, format_ = case.arrays, (case.N, case.K, case.nbits, case.G, case.axis)
        W = arrays["W"].reshape(case.N, case.K)
        for solver in Solver:
            parts = torch.ops.hqqlora.quantize(W, *format_[2:], W.dtype, int(solver))
            found = [arrays[f"solver{solver}_{part}"] for part in ("W_q", "scale", "zero")]
            assert_same(found[0], parts[0].reshape(-1).view(torch.uint8), (solver, format_))
            assert_same(found[1], parts[1], (solver, format_))
            assert_same(found[2], parts[2], (solver, format_))
        packed = case.packed(arrays["W_q"], arrays["scale"], arrays["zero"])
        for name in ("f32", "f16", "bf16"):
            found = arrays[f"W_{name}"]
            expected = torch.ops.hqqlora.dequantize(*packed, found.dtype)
            assert_same(found, expected, (name, format_))


def test_the_reference_kernel_gives_x86s_bits(cases) -> None:
    """Plain loops, compiled without contraction on every processor."""
    for case in cases:
        found = case.product.results(CpuOps("reference", "portable"))
        for name, value in zip(NAMES.values(), found, strict=True):
            assert_same(case.arrays[f"reference_{name}"], value, (name, case))


@pytest.mark.parametrize("kernel", ["direct", "tiled", "blocked"])
def test_products_are_those_of_x86_within_bounds(cases, kernel: str) -> None:
    """AArch64 has fused multiply-add everywhere, x86's portable kernels have none: sums differ
    in their last bits, by both sides' bounds at most; and each side is within its own."""
    differing = 0
    for case in cases:
        product = case.product
        x86 = product.results(CpuOps(kernel, "portable"))
        for name, value, (exact, bound) in zip(
            NAMES.values(), x86, product.expected(), strict=True
        ):
            found = case.arrays[f"{kernel}_{name}"].reshape(value.shape)
            assert ((found.double() - exact).abs() <= bound).all(), (name, case)
            assert ((found.double() - value.double()).abs() <= 2 * bound).all(), (name, case)
            differing += not torch.equal(found, value)
    assert differing  # the two are not the same code
