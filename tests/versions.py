"""One wheel under several Pythons, torch, transformers and PEFT (make test-versions).

    python tests/versions.py WHEEL [--only 3.12 ...] [--keep]

Every row gets an environment of its own under build/versions: pip installs the wheel with its
extras and the row's versions, and the tests run from an empty folder, so that it is the wheel
that is tested. On Linux, PyPI's torch is a CUDA build: some 7 GB, which is why an environment
is deleted after its row. The libraries of CUDA are the same files for every Python, and are
handed from row to row as hard links.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
FOLDER = TESTS.parent / "build" / "versions"
# What the wheel has of its own: kernels, gradients, layers; and where it meets transformers
# and PEFT.
FILES = (
    "test_autograd.py",
    "test_hqq_linear.py",
    "test_lora_linear.py",
    "test_transformers_quantize.py",
    "test_transformers_checkpoints.py",
    "test_peft_lora_layer.py",
)
TOOLS = ("pytest>=8", "hypothesis>=6", "numpy", "setuptools", "expecttest")
NAMES = ("torch", "transformers", "peft")  # the columns of the table, beside Python


class Row(NamedTuple):
    """A Python, and what pip is to install beside the wheel; without a version, the newest."""

    python: str
    requirements: tuple[str, ...]


# The oldest of everything that pyproject.toml allows, as far as they fit each other.
OLDEST = (
    "transformers==5.0.0", "peft==0.18.0", "accelerate==1.2.0", "gguf==0.10.0", "tqdm==4.60.0",
)  # fmt: skip
NEWEST = ("transformers", "peft", "accelerate", "gguf")
ROWS = (
    Row("3.11", ("torch==2.10.0", *OLDEST)),
    Row("3.11", ("torch==2.13.0", *OLDEST)),
    Row("3.11", ("torch==2.13.0", *NEWEST)),
    Row("3.11", ("torch", *NEWEST)),
    Row("3.12", ("torch", *NEWEST)),
    Row("3.13", ("torch", *NEWEST)),
    Row("3.10", ("torch", *NEWEST)),
)


class Outcome(NamedTuple):
    """What a row ran, and how it went."""

    versions: tuple[str, ...]
    passed: int
    failed: int
    skipped: int
    install_seconds: float
    test_seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--only", nargs="+", default=[], help="the rows that name one of these")
    parser.add_argument("--keep", action="store_true", help="leave the environments")
    options = parser.parse_args()
    wheel = options.wheel.resolve(strict=True)
    outcomes = []
    for row in ROWS:
        words = {row.python, *row.requirements[:2]}
        if not options.only or words.intersection(options.only):
            outcomes.append(run_row(row, wheel, options.keep))
            print(table(outcomes), flush=True)
    if not options.keep:
        shutil.rmtree(FOLDER / "shared", ignore_errors=True)
    return 0 if outcomes and all(o.passed and not o.failed for o in outcomes) else 1


def table(outcomes: list[Outcome]) -> str:
    """As Markdown."""
    heads = ("Python", *NAMES, "passed", "failed", "skipped", "install, s", "tests, s")
    lines = [heads, ("---",) * len(heads)]
    for versions, *counts, install, tests in outcomes:
        lines.append((*versions, *map(str, counts), f"{install:.0f}", f"{tests:.0f}"))
    return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- one row -----------------------------------------------------------------------------


def run_row(row: Row, wheel: Path, keep: bool) -> Outcome:
    place = FOLDER / "-".join((row.python, *row.requirements[:2])).replace("==", "-")
    begin = time.perf_counter()
    python = install(row, wheel, place)
    installed = time.perf_counter()
    empty = FOLDER / "run"
    empty.mkdir(exist_ok=True)
    versions = versions_of(python, place, empty)
    print("\n" + " ".join(versions), flush=True)
    subprocess.run([python, TESTS / "second_torch_smoke.py"], cwd=empty, check=True)
    counts = run_tests(python, empty)
    end = time.perf_counter()
    if not keep:
        shutil.rmtree(place)
    return Outcome(versions, *counts, installed - begin, end - installed)


def find_python(version: str) -> Path:
    """pyenv's, or that of the PATH (which may be a shim of pyenv's that is not switched on)."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [*sorted(pyenv.glob(f"{version}.*/bin/python")), shutil.which(f"python{version}")]
    for python in filter(None, found):
        if subprocess.run([python, "-c", ""], check=False).returncode == 0:
            return Path(python)
    raise SystemExit(f"there is no Python {version} here")


def install(row: Row, wheel: Path, place: Path) -> Path:
    """The row's environment; its Python. One that is there is brought up to date."""
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([find_python(row.python), "-m", "venv", place], check=True)
        pip(python, "--upgrade", "pip")
    (site,) = place.glob("lib/python3*/site-packages")
    shared = FOLDER / "shared"
    link_cuda(shared, site)
    pip(python, *row.requirements, *TOOLS, f"hqqlora[hf,gguf] @ {wheel.as_uri()}")
    pip(python, "--force-reinstall", "--no-deps", str(wheel))
    link_cuda(site, shared)
    return python


def pip(python: Path, *arguments: str) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *arguments], check=True)


def link_cuda(source: Path, target: Path) -> None:
    """Makes NVIDIA's packages in `source`, which hold no code of Python's, packages in `target`
    too. pip takes those of other versions out again."""
    for distribution in distributions(path=[str(source)]):
        if not distribution.metadata["Name"].startswith("nvidia-"):
            continue
        for file in distribution.files or ():
            link = target / file
            if link.suffix != ".pyc" and (source / file).exists() and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                os.link(source / file, link)


VERSIONS = f"""
import json, sys
from importlib.metadata import version
import hqqlora
names = {NAMES}
print(json.dumps([hqqlora.__file__, sys.version.split()[0], *map(version, names)]))
"""


def versions_of(python: Path, place: Path, folder: Path) -> tuple[str, ...]:
    """Of Python and of `NAMES`; and the package must be the installed one."""
    found = subprocess.run(
        [python, "-c", VERSIONS], cwd=folder, check=True, stdout=subprocess.PIPE
    )
    file, *versions = json.loads(found.stdout)
    if not Path(file).is_relative_to(place):
        raise SystemExit(f"{file} would be tested, not the wheel in {place}")
    return tuple(versions)


def run_tests(python: Path, folder: Path) -> tuple[int, int, int]:
    """Passed, failed, skipped."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    offline = {**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [python, "-m", "pytest", "-p", "no:cacheprovider", "-rs", f"--junitxml={report}",
         *(TESTS / name for name in FILES)],
        cwd=folder, env=offline, check=False,
    )  # fmt: skip
    if not report.exists():
        return 0, 1, 0
    (suite,) = ET.parse(report).getroot().iter("testsuite")
    total, failures, errors, skipped = (
        int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    return total - failed - skipped, failed, skipped


if __name__ == "__main__":
    sys.exit(main())
