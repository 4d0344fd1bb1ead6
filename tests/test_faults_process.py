"""What a process may do around the library: fork after it was used, import it twice, end while
its threads work."""

from __future__ import annotations

import subprocess
import sys

import pytest

USE = """
import torch, hqqlora
from torch import nn
torch.set_num_threads(2)
layer = hqqlora.HQQLinear(nn.Linear(512, 512), hqqlora.BaseQuantizeConfig(4, 64))
x = torch.randn(300, 512, requires_grad=True)
layer(x).sum().backward()
"""


def run(code: str, *options: str, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def test_workers_of_a_data_loader_that_are_forked_after_use() -> None:
    """They multiply, too; and the process that has forked them goes on."""
    done = run(
        USE
        + """
class Rows(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return layer(x.detach()[i * 30 : i * 30 + 30]).detach()

loader = torch.utils.data.DataLoader(Rows(), 2, num_workers=2, multiprocessing_context="fork")
expected = layer(x).detach()
got = torch.cat([batch.flatten(0, 1) for batch in loader])
torch.testing.assert_close(got, expected[:240])
layer(x).sum().backward()
print("ok")
"""
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr[-2000:]


def test_imported_twice_and_reloaded() -> None:
    done = run(
        USE
        + """
import importlib, sys
importlib.reload(hqqlora)
importlib.reload(hqqlora.ops)
first = layer(x)
for name in [name for name in sys.modules if name.split(".")[0] == "hqqlora"]:
    del sys.modules[name]
import hqqlora as again
assert again is not hqqlora
assert torch.equal(layer(x), first)
other = again.HQQLinear(nn.Linear(64, 64), again.BaseQuantizeConfig(4, 64))
other(torch.randn(3, 64, requires_grad=True)).sum().backward()
print("ok")
"""
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr[-2000:]


def test_a_process_ends_while_threads_live_that_have_multiplied() -> None:
    """Those of torch's pool, and some of its own. (In the middle of a product they would end it
    by an abort: so they do in torch's own, for Python ends daemon threads by an exception.)"""
    done = run(
        USE
        + """
import threading
used, never = threading.Barrier(3), threading.Event()
def work():
    layer(x).sum().backward()
    used.wait()
    never.wait()
for _ in range(2): threading.Thread(target=work, daemon=True).start()
used.wait()
layer(x).sum().backward()
print("ok", flush=True)
"""
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr[-2000:]


def test_importing_warns_of_nothing_of_ours() -> None:
    """Errors of whatever torch warns of itself as it is imported are not ours."""
    code = "import torch, warnings; warnings.simplefilter('error'); import hqqlora; print('ok')"
    done = run(code, "-X", "dev")
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr[-2000:]


def test_a_subinterpreter_is_refused_in_words() -> None:
    """torch itself hangs there."""
    name = "_xxsubinterpreters" if sys.version_info < (3, 13) else "_interpreters"
    interpreters = pytest.importorskip(name)
    done = run(
        f"""
import {interpreters.__name__} as interpreters
words = '''
try:
    import hqqlora
except ImportError as error:
    print(error, flush=True)
'''
interpreters.run_string(interpreters.create(), words)
"""
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("hqqlora cannot be imported in a subinterpreter"), done
