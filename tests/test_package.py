"""Importing the package: silent, light, and every name that it promises is there."""

import re
import subprocess
import sys

import hqqlora


def test_importing_it_is_silent_and_loads_no_model_library() -> None:
    code = (
        "import sys; from hqqlora import HQQLinear, save_adapter; "
        "heavy = {'transformers', 'peft', 'accelerate', 'matplotlib', 'gguf', 'hqq'}; "
        "sys.exit(f'{heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_its_names_are_all_there() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", hqqlora.__version__)
    assert all(hasattr(hqqlora, name) for name in hqqlora.__all__)
