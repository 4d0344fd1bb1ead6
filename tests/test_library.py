"""Loading the native library, and the environment variables that choose its kernels."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hqqlora.ops
from hqqlora.ops import library

TESTS = Path(__file__).parent


def run_python(code, **variables):
    """Runs code in a fresh Python, where the library is loaded anew. In the tests' folder, so
    that their modules are found, and the package is the installed one."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_import_is_silent():
    result = run_python("import hqqlora.ops, hqqlora.autograd")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("kernel", "isa"),
    [
        ("reference", ""),
        ("direct", "portable"),
        ("direct", "avx2"),
        ("direct", "avx512"),
        ("blocked", "avx2"),
    ],
)
def test_every_kernel_and_instruction_set_is_accurate(kernel, isa):
    """An instruction set above the processor's is lowered to it, so that this passes, if not
    always as meant, on any machine."""
    code = f"""
import test_ops, torch
torch.manual_seed(0)
cases = [c for c in test_ops.covering_cases() if c[0] * c[1] * c[2] < 200_000]
test_ops.check_products(cases)
test_ops.check_lora(cases)
if {kernel == "reference"}:
    test_ops.check_that_identity_gives_the_very_bits()
"""
    result = run_python(code, HQQLORA_KERNEL=kernel, HQQLORA_ISA=isa)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("variable", "names"),
    [
        ("HQQLORA_ISA", "portable, avx2, avx512, avx512_bf16, amx"),
        ("HQQLORA_KERNEL", "reference, direct, blocked, tiled"),
    ],
)
def test_a_mistake_in_the_environment_is_named(variable, names):
    code = """
import torch, hqqlora.ops
torch.ops.hqqlora.quantize(torch.ones(8, 8), 4, 8, 1, torch.float32)
"""
    result = run_python(code, **{variable: "fast"})
    message = f"RuntimeError: hqqlora: {variable} must be one of {names}, got 'fast'"
    assert result.stderr.strip().endswith(message)


def test_a_second_import_does_not_load_again():
    """From another path, as where a checkout and an installation meet."""
    folder = Path(hqqlora.ops.__file__).parent
    spec = importlib.util.spec_from_file_location(
        "second_ops", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["second_ops"] = module
    try:
        spec.loader.exec_module(module)
        assert module.Solver.MINMAX == 2
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "second_ops"]:
            del sys.modules[name]


def test_a_missing_library_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "package_folders", lambda: [tmp_path])
    with pytest.raises(ImportError, match=rf"not in {tmp_path}; build it .*pip install"):
        library.find_library()


def test_a_library_that_does_not_load_is_explained(monkeypatch, tmp_path):
    (tmp_path / library.LIBRARY).write_bytes(b"not a library")
    monkeypatch.setattr(library, "package_folders", lambda: [tmp_path])
    monkeypatch.setattr(library, "is_loaded", lambda: False)
    with pytest.raises(ImportError, match=r"does not load .*reinstall"):
        library.load()


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("2.9.1+cpu", False),
        ("1.13.0", False),
        ("2.10.0", True),
        ("2.13.0+cpu", True),
        ("3.0", True),
    ],
)
def test_an_old_torch_is_refused(monkeypatch, version, fits):
    monkeypatch.setattr(torch, "__version__", version)
    if fits:
        library.check_torch()
    else:
        with pytest.raises(ImportError, match=rf"torch >= 2.10, found {version[:5]}"):
            library.check_torch()
