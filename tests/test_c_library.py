"""The installed C library as a program outside the project meets it."""

import os
import re
import shutil
import subprocess

import c_library
import pytest


def declared() -> set[str]:
    return set(re.findall(r"HQQ_API[^;]*?\b(hqq_\w+)\(", c_library.header().read_text()))


def test_it_exports_what_the_header_declares_and_nothing_else():
    nm = shutil.which("nm")
    assert nm, "nm (binutils) comes with every C compiler"
    symbols = subprocess.run(
        [nm, "-D", "--defined-only", c_library.path()],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    exported = {line.split()[-1] for line in symbols.splitlines()}
    assert exported == declared()
    assert len(exported) == 17


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


def test_it_needs_no_torch_and_no_python():
    readelf = shutil.which("readelf")
    assert readelf, "readelf (binutils) comes with every C compiler"
    dynamic = subprocess.run(
        [readelf, "-d", c_library.path()], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.*?)\]", dynamic)
    assert all(name.startswith(("libc.", "libm.", "ld-linux")) for name in needed), needed
