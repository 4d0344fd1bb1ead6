"""The tools that are run, and what they print of a cubin's kernels.

A program that nvcc builds here is kept: it is built again when a source, a header that it
includes, the flags or nvcc itself have changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import instructions
from .instructions import Instruction

ROOT = Path(__file__).resolve().parents[2]
INCLUDES = ("kernels/cuda", "kernels", "c_api")


@dataclass(frozen=True, eq=False)  # each is itself
class Kernel:
    name: str
    """Demangled, without its parameters: hqq_product<__nv_bfloat16, 4, 1>"""
    arch: str
    code: Sequence[Instruction]
    registers: int
    stack_bytes: int
    static_shared_bytes: int
    """Without the kilobyte that the system keeps."""
    max_threads: int | None
    """What __launch_bounds__ says."""
    source: str = ""


class ToolError(RuntimeError):
    """A tool is missing, or failed: with what it said."""


def _python_package_bins() -> list[str]:
    """Where PyPI's nvidia-cuda-* packages put their programs."""
    sites = [sys.prefix, *site.getsitepackages(), site.getusersitepackages()]
    found: set[str] = set()
    for root in map(Path, sites):
        for pattern in ("nvidia/*/bin", "lib/python3*/site-packages/nvidia/*/bin"):
            found.update(str(path) for path in root.glob(pattern) if path.is_dir())
    return sorted(found)


def environment() -> dict[str, str]:
    """This process's, with the packages' and the toolkit's folders on PATH: cuobjdump looks for
    nvdisasm there."""
    places = [os.environ.get("PATH", ""), *_python_package_bins()]
    places += [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    return {**os.environ, "PATH": os.pathsep.join(places)}


PACKAGE = {
    "cuobjdump": "the CUDA toolkit, or: pip install nvidia-cuda-cuobjdump",
    "nvdisasm": "the CUDA toolkit, or: pip install nvidia-cuda-nvdisasm",
    "nvcc": "the CUDA toolkit",
    "c++filt": "binutils",
    "cmake": "pip install cmake",
}


def program(tool: str) -> str:
    found = shutil.which(tool, path=environment()["PATH"])
    if not found:
        raise ToolError(f"no {tool} on PATH ({PACKAGE.get(tool, 'built here')})")
    return found


def need_all() -> None:
    """Before minutes of compiling, not after."""
    for tool in PACKAGE:
        program(tool)


def run(tool: str, *arguments: str, given: str | None = None, where: Path | None = None) -> str:
    """What the tool prints, errors after output; `where` is its current folder."""
    done = subprocess.run(
        [program(tool), *arguments],
        env=environment(),
        text=True,
        capture_output=True,
        input=given,
        cwd=where,
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise ToolError(f"{tool} {' '.join(arguments)}: exit {done.returncode}\n{said}")
    return done.stdout + done.stderr


# ---- programs of the host, kept while nothing changes ----------------------------------------


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


@cache
def _digest_file(path: str) -> str:
    return digest(Path(path).read_bytes()) if Path(path).exists() else "missing"


def parse_dependencies(text: str) -> list[str]:
    """The files that a make rule names, without its target."""
    _, _, files = text.replace("\\\n", " ").partition(":")
    return files.split()


def _is_current(record: Path) -> bool:
    """Whether all files that a result was made of are as they were."""
    if not record.exists():
        return False
    known: dict[str, str] = json.loads(record.read_text())
    return all(_digest_file(path) == content for path, content in known.items())


@cache
def _compiler() -> str:
    return run("nvcc", "--version")


def _key(*parts: object) -> str:
    return digest(json.dumps([*map(str, parts), _compiler()]).encode())


def _record(record: Path, rules: Sequence[str]) -> None:
    """The toolkit's own files are covered by the version in the key."""
    files = {path for rule in rules for path in parse_dependencies(rule)}
    ours = sorted(path for path in files if "/targets/" not in path)
    record.write_text(json.dumps({path: _digest_file(path) for path in ours}))


def build_program(sources: Sequence[Path], flags: Sequence[str], target: Path) -> Path:
    """A host program that is built with nvcc."""
    record = target.with_name(f"{target.name}.{_key(*sources, *flags)}.json")
    if target.exists() and _is_current(record):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    rules = [run("nvcc", *flags, "-MM", str(source)) for source in sources]
    run("nvcc", *flags, "-o", str(target), *map(str, sources))
    for outdated in target.parent.glob(f"{target.name}.*.json"):
        outdated.unlink()
    _record(record, rules)
    return target


# ---- reading a cubin ------------------------------------------------------------------------


def parse_resources(text: str) -> dict[str, dict[str, int]]:
    """By symbol, from `cuobjdump -res-usage`: REG, STACK, SHARED and so on."""
    found: dict[str, dict[str, int]] = {}
    symbol = None
    for line in text.splitlines():
        if name := re.match(r"\s*Function (\S+):", line):
            symbol = name.group(1)
        elif symbol and "REG:" in line:
            pairs = re.findall(r"([A-Z]+(?:\[\d+\])?):(\d+)", line)
            found[symbol] = {key: int(value) for key, value in pairs}
            symbol = None
    return found


def parse_max_threads(text: str) -> dict[str, int]:
    """By symbol, from `cuobjdump -elf`: the block size of __launch_bounds__."""
    found: dict[str, int] = {}
    symbol, wanted = "", False
    for line in text.splitlines():
        if section := re.match(r"\.nv\.info\.(\S+)", line.strip()):
            symbol = section.group(1)
        elif "EIATTR_MAX_THREADS" in line or "EIATTR_REQNTID" in line:
            wanted = True
        elif wanted and (value := re.search(r"Value:\s*(0x\S+) (0x\S+) (0x\S+)", line)):
            x, y, z = (int(part, 16) for part in value.groups())
            found[symbol] = x * y * z
            wanted = False
    return found


def parse_arch(text: str) -> str:
    found = re.search(r"code for (sm_\d+)", text) or re.search(r"EF_CUDA_SM(\d+)", text)
    if not found:
        raise ToolError("cuobjdump names no architecture: not a cubin?")
    return found.group(1) if found.group(1).startswith("sm_") else f"sm_{found.group(1)}"


def short_name(demangled: str) -> str:
    """Without return type, parameters, unnamed namespaces and the casts of template arguments:
    `void f<(int)4, __nv_bfloat16>(int *)` becomes `f<4, __nv_bfloat16>`."""
    demangled = demangled.replace("(anonymous namespace)::", "")
    name = re.sub(r"\((?:int|bool|unsigned int|unsigned|long|char)\)", "", demangled)
    depth = 0
    for position, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:position]
            break
    return re.sub(r"^(?:static )?void ", "", name).strip()


def demangle(symbols: Sequence[str]) -> list[str]:
    if not symbols:
        return []
    return run("c++filt", given="\n".join(symbols)).splitlines()


def _text(cubin: Path, option: str, keep: bool) -> str:
    if not keep:
        return run("cuobjdump", option, str(cubin))
    text = cubin.with_suffix(f".{option.strip('-')}.txt")
    if not text.exists():
        text.write_text(run("cuobjdump", option, str(cubin)))
    return text.read_text()


def read_kernels(cubin: Path, source: str = "", keep: bool = False) -> list[Kernel]:
    """All kernels of a cubin; with `keep`, what cuobjdump prints is kept beside it."""
    text = _text(cubin, "-sass", keep)
    functions = instructions.parse(text)
    if not functions:
        return []
    arch = parse_arch(text)
    resources = parse_resources(_text(cubin, "-res-usage", keep))
    threads = parse_max_threads(_text(cubin, "-elf", keep))
    # from sm_90 on the kilobyte that the system keeps is in the figure, if there is one
    kept = 1024 if int(arch[3:].rstrip("a")) >= 90 else 0
    return [
        Kernel(
            name=short_name(name),
            arch=arch,
            code=functions[symbol],
            registers=resources[symbol]["REG"],
            stack_bytes=resources[symbol]["STACK"],
            static_shared_bytes=max(resources[symbol]["SHARED"] - kept, 0),
            max_threads=threads.get(symbol),
            source=source or cubin.name,
        )
        for symbol, name in zip(functions, demangle(list(functions)), strict=True)
        if symbol in resources  # device functions that were not inlined have none
    ]
