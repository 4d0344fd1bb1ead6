"""The examples as a user runs them: each in a process of its own, and its losses fall."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import c_library

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command, **options) -> str:
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, **options
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    assert result.stderr == ""
    return result.stdout


def test_minimal_c(tmp_path):
    """Compiles without a warning, outside the project, against what was installed."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or "cc"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror"]
    source = shutil.copy(EXAMPLES / "minimal.c", tmp_path)
    library = c_library.path()
    link = [f"-I{c_library.header().parent}", f"-L{library.parent}", "-lhqqlora"]
    link.append(f"-Wl,-rpath,{library.parent}")
    run(*compiler.split(), *flags, source, "-o", tmp_path / "minimal", *link)
    output = run(tmp_path / "minimal")
    assert re.match(r"192 x 256 weight: 196608 bytes in fp32, 30720 quantized\n", output)
    losses = [float(loss) for loss in re.findall(r"loss +(\S+)", output)]
    assert len(losses) == 6
    assert losses[-1] < 0.01 * losses[0]
    assert run(tmp_path / "minimal") == output  # and repeats


def test_train_loop():
    """Under 60 lines; torch.compile changes nothing."""
    script = EXAMPLES / "train_loop.py"
    assert len(script.read_text().splitlines()) < 60
    header, *rows = run(sys.executable, script, cwd="/").splitlines()
    assert header.split() == ["step", "eager", "compiled"]
    eager, compiled = zip(
        *((float(e), float(c)) for _, e, c in map(str.split, rows)), strict=True
    )
    assert eager == compiled
    assert eager[-1] < 0.1 * eager[0]
