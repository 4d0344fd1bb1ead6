"""The installed C libraries as a program outside the project meets them."""

import os
import re
import shutil
import subprocess

import c_library
import pytest


def declared() -> set[str]:
    return set(re.findall(r"HQQ_API[^;]*?\b(hqq_\w+)\(", c_library.header().read_text()))


LIBRARIES = {"libhqqlora.so": "HQQLORA_0", "libhqqlora_cuda.so": "HQQLORA_CUDA_0"}


@pytest.fixture(params=LIBRARIES)
def library(request):
    """Each library; that for CUDA where it was built."""
    try:
        return c_library.installed(request.param)
    except FileNotFoundError:
        if request.param == "libhqqlora.so":
            raise
        pytest.skip("the package was built without its CUDA library")


def test_it_exports_what_the_header_declares_and_nothing_else(library):
    """Under a version of its own, so that both libraries can be in one process."""
    nm = shutil.which("nm")
    assert nm, "nm (binutils) comes with every C compiler"
    symbols = subprocess.run(
        [nm, "-D", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    version = LIBRARIES[library.name]
    exported = {line.split()[-1] for line in symbols.splitlines()}
    assert exported == {f"{name}@@{version}" for name in declared()} | {version}
    assert len(exported) == 28 + 1


@pytest.mark.parametrize(
    ("compiler", "language"),
    [
        (os.environ.get("CC", "cc"), ["-x", "c", "-std=c11"]),
        (os.environ.get("CXX", "c++"), ["-x", "c++", "-std=c++17"]),
    ],
)
def test_the_header_alone_compiles(compiler, language, tmp_path):
    source = tmp_path / "header_alone"
    source.write_text("#include <hqqlora.h>\n")
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror"]
    include = f"-I{c_library.header().parent}"
    result = subprocess.run(
        [*compiler.split(), *language, *warnings, include, "-fsyntax-only", source],
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_it_needs_no_torch_no_python_and_no_cuda(library):
    """The CUDA library brings the CUDA runtime along, and finds cuBLASLt when it needs it."""
    readelf = shutil.which("readelf")
    assert readelf, "readelf (binutils) comes with every C compiler"
    dynamic = subprocess.run(
        [readelf, "-d", library], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.*?)\]", dynamic)
    allowed = ("libc.", "libm.", "ld-linux")
    if library.name == "libhqqlora_cuda.so":
        allowed += ("libdl.", "libpthread.", "librt.", "libgcc_s.", "libstdc++.")
    assert all(name.startswith(allowed) for name in needed), needed
