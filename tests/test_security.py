"""What SECURITY.md promises of the package's code."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for room in ("hqqlora", "ops", "autograd")
    for path in sorted((ROOT / room).rglob("*.py"))
]
# The plan of `hqqlora quantize` comes through a pipe from its own child, not from a file.
PICKLE = {"hqqlora/quantize_command/plan_apart.py"}
# Where torch.load is called, after checks of its own.
TORCH_LOAD = {"hqqlora/torch_files.py"}
# Who opens files to write: the one atomic writer, and what is said of each of the others.
WRITERS = {
    "hqqlora/files.py",
    "hqqlora/quantize_command/plan_apart.py",  # standard output
    "hqqlora/command/machine.py",  # /proc/self/clear_refs, which restarts a counter
}
ONLY_IN_FILES = {
    *("os.replace", "os.rename", "os.link", "shutil.move"),
    *("torch.save", "safetensors.torch.save_file"),
}
RUNS_CODE = {
    *("eval", "exec", "compile", "__import__", "execfile"),
    *("os.system", "os.popen", "subprocess.call", "subprocess.Popen", "runpy.run_path"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open"),
    *("dill.load", "dill.loads", "cloudpickle.loads", "joblib.load", "yaml.load"),
}


class Calls(ast.NodeVisitor):
    """The name and keywords of each call, whether or not modules go by other names."""

    def __init__(self, source: str) -> None:
        self.aliases: dict[str, str] = {}
        self.found: list[tuple[str, ast.Call]] = []
        self.visit(ast.parse(source))

    def visit_Import(self, node: ast.Import) -> None:
        self.aliases.update((name.asname or name.name, name.name) for name in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for name in node.names:
            self.aliases[name.asname or name.name] = f"{node.module}.{name.name}"

    def visit_Call(self, node: ast.Call) -> None:
        first, _, rest = ast.unparse(node.func).partition(".")
        full = self.aliases.get(first, first)
        self.found.append((f"{full}.{rest}" if rest else full, node))
        self.generic_visit(node)


def keyword(call: ast.Call, name: str) -> str | None:
    found = [ast.unparse(k.value) for k in call.keywords if k.arg == name]
    return found[0] if found else None


@functools.cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """(file, name, call) of the whole package."""
    return [
        (str(path.relative_to(ROOT)), name, call)
        for path in SOURCES
        for name, call in Calls(path.read_text()).found
    ]


class TestCode:
    def test_the_whole_package_is_looked_at(self) -> None:
        assert len(SOURCES) > 100
        assert len(calls()) > 3000

    def test_nothing_evaluates_text_or_unpickles_a_file(self) -> None:
        found = {(file, name) for file, name, _ in calls() if name in RUNS_CODE}
        assert {file for file, _ in found} == PICKLE, found

    def test_the_search_sees_what_it_looks_for(self) -> None:
        source = (
            "import pickle as p\nfrom os import system as s\np.loads(b'')\ns('x')\neval('1')"
        )
        assert [n for n, _ in Calls(source).found] == ["pickle.loads", "os.system", "eval"]

    def test_torch_load_is_called_in_one_place_with_weights_only(self) -> None:
        found = [(file, call) for file, name, call in calls() if name == "torch.load"]
        assert {file for file, _ in found} == TORCH_LOAD
        assert [keyword(call, "weights_only") for _, call in found] == ["True"]

    def test_no_code_of_a_model_is_trusted(self) -> None:
        for file, _, call in calls():
            assert keyword(call, "trust_remote_code") in (None, "False"), file
        for path in SOURCES:
            assert '"trust_remote_code": True' not in path.read_text(), path

    def test_a_child_process_is_this_python_and_no_shell(self) -> None:
        for file, name, call in calls():
            if name.startswith("subprocess."):
                assert name == "subprocess.run", file
                assert "[sys.executable, " in (ROOT / file).read_text(), file
                assert keyword(call, "shell") is None, file

    def test_files_are_written_by_the_atomic_writer_alone(self) -> None:
        """What is opened for writing has the name that it lends, or is in the list above."""
        for file, name, call in calls():
            last = name.rpartition(".")[2]
            arguments = [ast.unparse(argument) for argument in call.args]
            if name in ONLY_IN_FILES:
                assert file == "hqqlora/files.py", (file, name)
            elif last in ("write_text", "write_bytes", "savefig", "dump", "copyfile"):
                lent = "temporary" in arguments or name.startswith("temporary.")
                assert lent or file in WRITERS or name == "hqqlora.files.write_text", (
                    file,
                    name,
                )
            elif last in ("open", "fdopen"):
                modes = [a for a in arguments if a.strip("'").rstrip("bt+") in ("w", "a", "x")]
                assert not modes or file in WRITERS, (file, ast.unparse(call))
