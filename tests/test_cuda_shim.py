"""The ops and CUDA tensors, where there is no GPU: tracing, the words of every refusal, and
what a package without CUDA kernels says. tests/test_cuda_device.py computes on a GPU."""

import ctypes
import functools
import inspect
import mmap
import os
import re
import warnings

import pytest
import torch
from op_arguments import ALL, call, forward_arguments
from oracle import random_adapter, random_weight
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensorMode

import hqqlora.autograd
import hqqlora.ops
from hqqlora.ops import fakes, library

ops = torch.ops.hqqlora
NAMES = {op: [a.name for a in op.default._schema.arguments] for op in ALL}
# Without kernels for its GPUs, a CUDA build of torch refuses to trace as well.
traces_cuda = pytest.mark.skipif(
    torch.version.hip is not None or bool(getattr(ops, "refused_cuda", None)),
    reason="this hqqlora has no kernels for the devices of this torch",
)
knows_cuda = pytest.mark.skipif(
    torch.version.cuda is None,
    reason="such a torch ends the process where tensors on cuda take part in autograd",
)


def on(device, arguments):
    """The arguments with all tensors on a device, but for an expert's rows."""
    return {
        name: value.to(device)
        if isinstance(value, torch.Tensor) and name != "offsets"
        else value
        for name, value in arguments.items()
    }


@pytest.fixture
def fake_arguments():
    """Arguments of all ops on cuda:1, without data, and the mode in which they live."""
    yield from without_data(forward_arguments(dropout=0.25))


@pytest.fixture
def fake_3_bit_arguments():
    """The same of a weight that has two packings."""
    yield from without_data(forward_arguments(nbits=3))


@pytest.fixture
def fake_grouped_arguments():
    """The same of the grouped ops, with one expert that has all the rows."""
    real = forward_arguments(dropout=0.25)
    stacked = {key: real[key][None] for key in ("W_q", "scale", "zero", "A", "B")}
    rows = {key: real[key].flatten(0, -2) for key in ("x", "dy", "xa")}
    offsets = torch.tensor([0, rows["x"].size(0)])
    yield from without_data({**real, **stacked, **rows, "offsets": offsets})


def without_data(real):
    with FakeTensorMode() as mode:
        yield on(
            "cuda:1",
            {
                name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
                for name, value in real.items()
            },
        )


# ---- tracing -----------------------------------------------------------------------------


@traces_cuda
@pytest.mark.parametrize("op", ALL, ids=str)
def test_results_are_where_the_arguments_are(op, fake_arguments):
    results = call(op, fake_arguments)
    expected = call(op, on("meta", fake_arguments))
    for found, right in zip(*map(torch.utils._pytree.tree_leaves, (results, expected))):  # noqa: B905
        assert found.device == torch.device("cuda:1")
        assert (found.shape, found.dtype) == (right.shape, right.dtype)
        assert found.stride() == right.stride()


@traces_cuda
def test_the_differentiable_functions_trace(fake_arguments):
    a = fake_arguments
    weight = hqqlora.ops.PackedWeight(*(a[name] for name in hqqlora.ops.PackedWeight._fields))
    y = hqqlora.autograd.lora_linear(a["x"], weight, a["bias"], a["A"], a["B"], 0.5, 0.25)
    assert (y.device, y.dtype) == (torch.device("cuda:1"), torch.float32)
    torch.set_autocast_enabled("cuda", True)  # torch.autocast itself asks for a GPU
    try:
        y = hqqlora.autograd.lora_linear(a["x"], weight, a["bias"], a["A"], a["B"], 0.5)
        assert y.dtype == torch.get_autocast_dtype("cuda") == torch.float16
        assert hqqlora.autograd.linear(a["x"], weight).dtype == torch.float16
    finally:
        torch.set_autocast_enabled("cuda", False)


# ---- tensors on several devices ----------------------------------------------------------


def refusal(function, *arguments):
    with pytest.raises(RuntimeError) as refused:
        function(*arguments)
    return str(refused.value)


def strays(op):
    """The tensors of an op that have to be where its first one is."""
    optional = {"x", "xa"} if op is ops.lora_linear_backward else set()
    known = {"W_q", "scale", "zero", "bias", "A", "B", "seed"} | optional
    return [name for name in NAMES[op][1:] if name in known]


@traces_cuda
@pytest.mark.parametrize("place", ["cpu", "cuda:0"])
@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in ALL for name in strays(op)], ids=str
)
def test_a_stray_tensor_is_named_with_both_devices(op, name, place, fake_arguments):
    arguments = {**fake_arguments, name: fake_arguments[name].to(place)}
    expected = f"hqqlora: {name} must be on cuda:1, got a tensor on {place}"
    assert refusal(call, op, arguments) == expected


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in ALL for name in strays(op)], ids=str
)
def test_the_kernels_name_devices_in_the_same_words(op, name):
    """Called past torch's dispatcher, which gives tensors without data to the fakes."""
    arguments = forward_arguments(dropout=0.25)
    arguments[name] = arguments[name].to("meta")
    in_order = [arguments[n] for n in NAMES[op] if n in arguments]
    on_cpu = functools.partial(op.default.redispatch, DispatchKeySet(DispatchKey.CPU))
    assert refusal(on_cpu, *in_order) == f"hqqlora: {name} must be on cpu, got a tensor on meta"


def test_the_shim_hands_the_seed_on_unread():
    """Its memory may be a GPU's. Here it may not be read, by calls whose kernels need none."""
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    a = forward_arguments(dropout=0.25)
    a["seed"] = torch.frombuffer(memory, dtype=torch.int64, count=1)
    empty = {**a, "x": a["x"][..., :0, :]}
    unread = {**a, "needs_dx": False, "needs_dA": False, "needs_dB": True}
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            page = ctypes.c_void_p(a["seed"].data_ptr())
            assert ctypes.CDLL(None).mprotect(page, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
            call(ops.lora_linear, empty)
            call(ops.lora_linear_backward, unread)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0  # not ended by SIGSEGV


def test_the_kernels_of_the_cpu_refuse_other_tensors():
    arguments = forward_arguments()
    in_order = [arguments[name].to("meta") for name in NAMES[ops.quantize] if name == "weight"]
    on_cpu = functools.partial(ops.quantize.default.redispatch, DispatchKeySet(DispatchKey.CPU))
    message = refusal(on_cpu, *in_order, 4, 8, 1, torch.float32)
    assert message == "hqqlora: the tensors must be on cpu, got tensors on meta"


# ---- the library with the CUDA kernels ---------------------------------------------------


def has_cuda_kernel(op):
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.default.name(), "CUDA")


@pytest.mark.skipif(
    torch.version.cuda is None or bool(getattr(ops, "refused_cuda", None)),
    reason="needs a CUDA build of torch and the CUDA kernels",
)
@pytest.mark.parametrize("op", ALL, ids=str)
def test_the_cuda_half_is_registered_and_runs_up_to_its_checks(op):
    """Called past torch's dispatcher with CPU tensors: its own code answers."""
    assert has_cuda_kernel(op)
    arguments = forward_arguments()
    options = [0, 20, True, False, 0.7, 10.0, 1.0] if op is ops.quantize else []
    in_order = [arguments[name] for name in NAMES[op] if name in arguments]
    on_cuda = functools.partial(op.default.redispatch, DispatchKeySet(DispatchKey.CUDA))
    message = refusal(on_cuda, *in_order, *options)
    assert message == "hqqlora: the tensors must be on cuda, got tensors on cpu"


@pytest.mark.skipif(
    torch.version.cuda is not None or torch.version.hip is not None,
    reason="a torch that knows no CUDA",
)
@pytest.mark.parametrize("op", ALL, ids=str)
def test_a_torch_without_cuda_has_nothing_to_refuse(op):
    assert library.load_cuda() is None
    assert not has_cuda_kernel(op)


def test_a_package_without_cuda_kernels_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(library, "package_folders", lambda: [tmp_path])
    assert library.load_cuda() == (
        f"no CUDA kernels: this hqqlora was built without them (hqqlora_torch_cuda.so is not "
        f"in {tmp_path}); with nvcc of CUDA 13.0 on the PATH, reinstall it: "
        f"pip install --no-build-isolation --force-reinstall --no-deps ."
    )


def test_cuda_kernels_that_do_not_load_are_explained(monkeypatch, tmp_path):
    (tmp_path / library.CUDA_LIBRARY).write_bytes(b"not a library")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(library, "package_folders", lambda: [tmp_path])
    assert re.fullmatch(
        rf"no CUDA kernels: {tmp_path}/hqqlora_torch_cuda.so does not load \(.+\); it may have "
        r"been built for another CUDA; with nvcc of CUDA 12.8 on the PATH, reinstall it: .*",
        library.load_cuda(),
    )


def test_a_torch_for_other_gpus_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch, "__version__", "2.13.0+rocm6.4")
    assert library.load_cuda() == (
        "no CUDA kernels: torch 2.13.0+rocm6.4 is for AMD's GPUs, hqqlora for NVIDIA's and for "
        "CPUs"
    )


@pytest.mark.parametrize("op", ALL, ids=str)
def test_without_cuda_kernels_the_ops_say_why(op):
    arguments = forward_arguments()
    in_order = [arguments[name] for name in NAMES[op] if name in arguments]
    on_cuda = functools.partial(op.default.redispatch, DispatchKeySet(DispatchKey.CUDA))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these replace the CUDA kernels, where there are
        registration = library.refuse_cuda("why")
    try:
        assert refusal(on_cuda, *in_order) == "hqqlora: why"
    finally:
        registration._destroy()


@pytest.mark.parametrize("fake", fakes.FAKES, ids=lambda fake: fake.__name__)
def test_without_cuda_kernels_tracing_says_why(fake, request):
    refusing = fakes._refusing_cuda(fake, "why")
    kind = "grouped_" if fake.__name__.startswith("grouped") else ""
    kind = "3_bit_" if fake is fakes.repack else kind
    arguments = request.getfixturevalue(f"fake_{kind}arguments")
    names = inspect.signature(fake).parameters
    chosen = {name: value for name, value in arguments.items() if name in names}
    with pytest.raises(RuntimeError, match=r"^hqqlora: why$"):
        refusing(**chosen)
    refusing(**on("cpu", chosen))


# ---- layers ------------------------------------------------------------------------------


def quantized_layer(nbits=4):
    config = hqqlora.BaseQuantizeConfig(nbits=nbits, group_size=16)
    return hqqlora.HQQLinear(torch.nn.Linear(32, 24), config, compute_dtype=torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("lora", [False, True])
def test_moving_a_layer_to_a_gpu_that_is_not_there_is_torchs_error(lora):
    layer = quantized_layer()
    if lora:
        layer = hqqlora.LoRALinear(layer, 4)
    x = torch.randn(3, 32)
    before = layer(x)
    with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda|nvidia"):
        layer.to("cuda")
    with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda|nvidia"):
        layer(x.to("cuda"))
    assert torch.equal(layer(x), before)  # and all is as it was


def move(module, device):
    """What .to(device) does; it cannot do it to tensors without data, as there is no GPU."""
    for child in module.modules():
        for name, p in child._parameters.items():
            if p is not None:
                child._parameters[name] = torch.nn.Parameter(p.to(device), p.requires_grad)
    return module


@traces_cuda
@knows_cuda
def test_a_layer_on_cuda():
    cuda = torch.device("cuda:1")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        base = move(quantized_layer(), cuda)
        assert base.device == base.weight.device == cuda
        layer = hqqlora.LoRALinear(base, 4, lora_dropout=0.1, lora_bias=True)
        assert {p.device for p in layer.parameters()} == {cuda}
        x = torch.randn(3, 32, device=cuda)
        for y in (layer(x), base(x), base(x.half())):
            assert (y.shape, y.device) == ((3, 24), cuda)
        assert layer.to_dense().weight.device == cuda
        layer.merge()
        assert base.device == base.bias.device == cuda
        layer.unmerge()
        assert {p.device for p in layer.parameters()} == {cuda}


@traces_cuda
@knows_cuda
def test_three_bits_are_in_words_on_cuda_and_in_planes_elsewhere():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        layer = quantized_layer(nbits=3)
        assert layer.W_q.dtype == torch.uint8
        before = layer.device
        move(layer, "cuda:1")._repack_after_move(before)
        assert layer.W_q.dtype == torch.int32
        before = layer.device
        move(layer, "cpu")._repack_after_move(before)
        assert layer.W_q.dtype == torch.uint8


@traces_cuda
@knows_cuda
def test_a_layer_is_made_on_cuda():
    config = hqqlora.BaseQuantizeConfig(nbits=2, group_size=16)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for dense, device in (
            (torch.nn.Linear(32, 24), "cuda:1"),
            (move(torch.nn.Linear(32, 24), "cuda:1"), None),
        ):
            layer = hqqlora.HQQLinear(dense, config, device=device)
            assert {p.device for p in layer.parameters()} == {torch.device("cuda:1")}


@traces_cuda
def test_a_layer_that_stayed_behind_is_named():
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = quantized_layer()
        message = refusal(layer, torch.randn(3, 32, device="cuda:0"))
        assert message == "hqqlora: W_q must be on cuda:0, got a tensor on cpu"


# ---- whole graphs ------------------------------------------------------------------------


def exported_for_cuda():
    """lora_linear with dropout as a graph of torch's operations."""
    weight, adapter = random_weight(24, 32, 16), random_adapter(24, 32, 4)

    def forward(x, A, B, *parts):
        packed = hqqlora.ops.PackedWeight(*parts, *weight.packed[3:])
        return hqqlora.autograd.lora_linear(x, packed, None, A, B, 0.5, 0.25)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        parts = [mode.from_tensor(t).to("cuda:0") for t in weight.packed[:3]]
        inputs = [mode.from_tensor(t).to("cuda:0") for t in (adapter.A, adapter.B)]
        x = torch.randn(5, 32, device="cuda:0")
        return torch.fx.experimental.proxy_tensor.make_fx(forward)(x, *inputs, *parts)


@traces_cuda
def test_a_graph_for_cuda_is_exported_without_a_gpu():
    assert "torch.ops.hqqlora.lora_linear.default" in exported_for_cuda().code


@traces_cuda
def test_a_graph_with_dropout_is_all_on_cuda():
    """Else torch.compile leaves out CUDA graphs, or they would repeat one mask for ever."""
    nodes = exported_for_cuda().graph.nodes
    (draw,) = (node for node in nodes if node.target is torch.ops.aten.randint.default)
    (product,) = (node for node in nodes if node.target is ops.lora_linear.default)
    assert draw in product.args
    places = {
        n.meta["val"].device for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)
    }
    assert places == {draw.kwargs["device"]} == {torch.device("cuda:0")}
