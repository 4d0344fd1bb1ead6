"""PEFT takes quantized layers for what they are, without a word of ours in the user's code."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from forked_python import ForkedPython
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model  # noqa: E402
from peft_models import dense_twin, tiny_quantized  # noqa: E402

import hqqlora.peft  # noqa: E402
from hqqlora.peft import HQQLoraLinear  # noqa: E402

SCRIPT = """
import torch
from torch import nn
from hqqlora import BaseQuantizeConfig, HQQLinear

layer = HQQLinear(nn.Linear(64, 64), BaseQuantizeConfig(), compute_dtype=torch.float32)
model = nn.Sequential(layer)
model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
assert type(model.base_model.model[0]).__name__ == "HQQLoraLinear", model
"""


@pytest.fixture(scope="module")
def forked() -> Iterator[ForkedPython]:
    python = ForkedPython("transformers.modeling_utils")
    yield python
    python.close()


@pytest.fixture
def run(forked: ForkedPython, tmp_path: Path) -> Callable[[str], None]:
    """Runs code in a process of its own, in which transformers has been imported, but neither
    PEFT nor this library."""

    def run_it(code: str) -> None:
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "script.py").write_text(code)
        status, _, errors = forked.run(folder / "script.py", folder=folder)
        assert status == 0, errors

    return run_it


class TestImportOrders:
    def test_peft_after_hqqlora(self) -> None:
        code = (
            "import sys, importlib.util, hqqlora\n"
            "hqqlora.peft.install()\n"
            "ours = [f for f in sys.meta_path if getattr(f, 'module', '') == 'peft']\n"
            "assert len(ours) == 1, 'installed twice'\n"
            "assert 'peft' not in sys.modules and 'transformers' not in sys.modules\n"
            "assert importlib.util.find_spec('peft') is not None\n"
            "assert 'peft' not in sys.modules\n"
            "import peft\n"
            "assert ours[0] not in sys.meta_path\n"
            "assert type(peft.__spec__.loader).__module__ != 'hqqlora.import_hook'\n"
            "assert type(peft.__loader__).__module__ != 'hqqlora.import_hook'\n" + SCRIPT
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_a_part_of_peft_after_hqqlora(self, run: Callable[[str], None]) -> None:
        run("import hqqlora\nimport peft.tuners.lora.model\n" + SCRIPT)

    def test_a_name_that_needs_peft_before_peft(self, run: Callable[[str], None]) -> None:
        run(
            "import warnings\n"
            "warnings.simplefilter('error', UserWarning)\n"
            "from hqqlora.peft import HQQLoraLinear\n"
            "import peft\n" + SCRIPT
        )

    def test_peft_before_hqqlora(self, run: Callable[[str], None]) -> None:
        run("import peft, hqqlora\n" + SCRIPT)

    def test_without_peft_there_is_nothing_to_connect(self, run: Callable[[str], None]) -> None:
        run(
            "import sys, importlib.util, hqqlora\n"
            "sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
            "sys.path_importer_cache.clear()\n"
            "assert importlib.util.find_spec('peft') is None\n"
            "try:\n"
            "    import peft\n"
            "except ModuleNotFoundError:\n"
            "    sys.exit(0)\n"
            "sys.exit('peft was found')\n"
        )

    def test_a_peft_that_it_does_not_know_is_imported_with_a_warning(
        self, run: Callable[[str], None], tmp_path: Path
    ) -> None:
        (tmp_path / "peft").mkdir()
        (tmp_path / "peft" / "__init__.py").write_text("__version__ = '99.0'\n")
        run(
            f"import sys, warnings; sys.path.insert(0, {str(tmp_path)!r})\n"
            "import hqqlora\n"
            "with warnings.catch_warnings(record=True) as caught:\n"
            "    warnings.simplefilter('always')\n"
            "    import peft\n"
            "assert peft.__version__ == '99.0'\n"
            "assert 'cannot connect to peft 99.0' in str(caught[0].message), caught\n"
        )

    def test_a_failing_import_of_peft_may_be_tried_again(
        self, run: Callable[[str], None], tmp_path: Path
    ) -> None:
        (tmp_path / "peft").mkdir()
        (tmp_path / "peft" / "__init__.py").write_text("raise ValueError('broken')\n")
        run(
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
            "import hqqlora\n"
            "try:\n"
            "    import peft\n"
            "except ValueError:\n"
            "    pass\n"
            "sys.path.pop(0); sys.path_importer_cache.clear()\n"
            "import peft\n" + SCRIPT
        )


class TestEnabling:
    def test_twice_is_once(self) -> None:
        import peft.tuners.lora.model as lora_model

        hqqlora.peft.enable()
        before = lora_model.dispatch_hqq, peft.PeftModel.get_nb_trainable_parameters
        hqqlora.peft.enable()
        after = lora_model.dispatch_hqq, peft.PeftModel.get_nb_trainable_parameters
        assert before == after

    def test_dense_layers_get_pefts_own_layer(self) -> None:
        model = get_peft_model(
            nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), LoraConfig(target_modules=["0"])
        )
        assert type(model.base_model.model[0]) is peft.tuners.lora.Linear

    def test_layers_of_the_hqq_package_get_pefts_own_layer(self) -> None:
        quantize = pytest.importorskip("hqq.core.quantize")
        layer = quantize.HQQLinear(
            nn.Linear(64, 64),
            quantize.BaseQuantizeConfig(),
            compute_dtype=torch.float32,
            device="cpu",
        )
        model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"]))
        assert type(model.base_model.model[0]).__name__ == "HqqLoraLinear"

    def test_all_linear_means_every_quantized_layer(self) -> None:
        model = get_peft_model(tiny_quantized(), LoraConfig(target_modules="all-linear"))
        adapted = [n for n, m in model.named_modules() if isinstance(m, HQQLoraLinear)]
        assert len(adapted) == 2 * 7
        assert "lora.HQQLoraLinear" in repr(model)
        assert not isinstance(model.get_output_embeddings(), HQQLoraLinear)

    def test_a_transposed_weight_is_refused(self) -> None:
        config = LoraConfig(target_modules=["q_proj"], fan_in_fan_out=True)
        with pytest.raises(ValueError, match="fan_in_fan_out"):
            get_peft_model(tiny_quantized(), config)


class TestCounting:
    def test_a_weight_counts_as_what_it_stands_for(self, capsys) -> None:
        quantized = tiny_quantized()
        dense = sum(p.numel() for p in dense_twin(quantized, torch.float32).parameters())
        model = get_peft_model(quantized, LoraConfig(r=4, target_modules=["q_proj"]))
        trainable = 2 * 4 * (64 + 64)
        assert model.get_nb_trainable_parameters() == (trainable, dense + trainable)
        model.print_trainable_parameters()
        assert f"all params: {dense + trainable:,d}" in capsys.readouterr().out

    def test_dense_models_are_counted_as_before(self) -> None:
        model = get_peft_model(
            nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"])
        )
        assert model.get_nb_trainable_parameters() == (32, 72 + 32)
