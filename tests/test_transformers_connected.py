"""transformers loads models quantized by HQQ wherever hqqlora is imported. Without it,
transformers 5 fills such layers with random numbers and goes on."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tiny_llama import save_model_and_text

from hqqlora.cli import main

LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({path!r})
layer = model.model.layers[0].mlp.down_proj
assert type(layer) is hqqlora.HQQLinear, layer
assert layer.W_q is not None
"""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = save_model_and_text(tmp_path_factory.mktemp("connected"), lines=10)
    assert main(["quantize", str(folder / "model"), str(folder / "small")]) == 0
    return str(folder / "small")


@pytest.mark.parametrize(
    "imports", ["import hqqlora", "import transformers.modeling_utils, hqqlora"]
)
def test_in_any_order(quantized: str, imports: str) -> None:
    run(f"{imports}\n{LOAD.format(path=quantized)}")


def test_importing_hqqlora_imports_no_transformers() -> None:
    run("import sys, hqqlora\nassert 'transformers' not in sys.modules\n")


def test_one_that_it_does_not_know_is_imported_with_a_warning(tmp_path: Path) -> None:
    found = run_with_fake(tmp_path, "99.0")
    assert "cannot connect to transformers 99.0, which will not load" in found


def test_one_that_has_an_hqq_of_its_own_is_left_alone(tmp_path: Path) -> None:
    assert run_with_fake(tmp_path, "4.57.1") == ""


def run_with_fake(folder: Path, version: str) -> str:
    """The warnings of importing a package of that version with nothing in it."""
    (folder / "transformers").mkdir()
    (folder / "transformers/__init__.py").write_text(f"__version__ = {version!r}\n")
    (folder / "transformers/modeling_utils.py").write_text("")
    return run(
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        "import warnings, hqqlora\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import transformers.modeling_utils\n"
        "print(*(warning.message for warning in caught), end='')\n"
    )


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
