"""What the built libraries ask of the system and of torch, read from their symbol tables."""

import re
import shutil
import subprocess

import c_library
import pytest

pytestmark = pytest.mark.skipif(
    shutil.which("objdump") is None, reason="needs objdump (Debian: apt install binutils)"
)
SHIM = "hqqlora_torch.so"
# manylinux_2_28: PEP 600 by way of auditwheel's policy. (Each is a number or a dotted one.)
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
# The functions of torch/csrc/stable and the C functions under it: torch promises to keep them.
STABLE = re.compile(r"(aoti_)?torch_[a-z0-9_]+")


def objdump(option, name):
    found = subprocess.run(
        ["objdump", option, c_library.installed(name)],
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout


def undefined(name):
    """Symbol -> version ("" without one) of all that a library takes from others."""
    symbols = {}
    for line in objdump("-T", name).splitlines():
        if "*UND*" in line:
            _, *version, symbol = line.partition("*UND*")[2].split()  # first, the size
            symbols[symbol] = "".join(version).strip("()").replace("Base", "")
    return symbols


def needed(name):
    return re.findall(r"NEEDED\s+(\S+)", objdump("-p", name))


@pytest.mark.parametrize("name", ["libhqqlora.so", SHIM])
def test_nothing_newer_than_manylinux_2_28_is_needed(name):
    versions = {version for version in undefined(name).values() if version}
    assert any(version.startswith("GLIBC_") for version in versions)
    newer = set()
    for version in versions:
        library, _, number = version.partition("_")
        if library not in NEWEST:
            assert version == "HQQLORA_0"  # the shim's own C library
        elif tuple(map(int, number.split("."))) > NEWEST[library]:
            newer.add(version)
    assert not newer, {s: v for s, v in undefined(name).items() if v in newer}


def test_the_c_library_needs_neither_torch_nor_cxx():
    libraries = {"libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2", "libpthread.so.0"}
    assert set(needed("libhqqlora.so")) <= libraries
    assert not [s for s in undefined("libhqqlora.so") if "torch" in s]


def test_the_shim_takes_only_the_stable_abi_from_torch():
    assert [n for n in needed(SHIM) if "torch" in n or "c10" in n] == ["libtorch_cpu.so"]
    unversioned = [symbol for symbol, version in undefined(SHIM).items() if not version]
    of_the_compiler = {
        "_ITM_deregisterTMCloneTable",
        "_ITM_registerTMCloneTable",
        "__gmon_start__",
    }
    from_torch = set(unversioned) - of_the_compiler
    assert "torch_call_dispatcher" in from_torch
    assert [symbol for symbol in from_torch if not STABLE.fullmatch(symbol)] == []
