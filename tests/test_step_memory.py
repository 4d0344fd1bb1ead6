"""What a training step of a quantized model with adapters may hold: no dense weight, nothing
twice, no input that no gradient needs."""

from collections import defaultdict
from contextlib import contextmanager

import c_library
import pytest
import torch
from backends import ISAS
from peft_models import tiny_quantized, token_ids
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hqqlora
from hqqlora.saved_activations import SavedActivations

pytestmark = pytest.mark.usefixtures("one_thread")

# Widths that no number of tokens, heads or words makes by chance.
SHAPE = {"hidden_size": 256, "intermediate_size": 320, "attention_bias": False}
HIDDEN, RANK = 256, 4
KINDS = ("own", "peft")
# The model's dtype, the adapters', and whether autocast to bfloat16 is on.
DTYPES = {
    "fp32": (torch.float32, torch.float32, False),
    "bf16": (torch.bfloat16, torch.float32, False),
    "bf16-adapters": (torch.bfloat16, torch.bfloat16, False),
    "autocast": (torch.float32, torch.float32, True),
    "mixed": (torch.float32, torch.bfloat16, False),
    "autocast-half-adapters": (torch.float32, torch.float16, True),
}


def adapted(kind, dtypes):
    """A tiny Llama with adapters, and its training step."""
    dtype, adapter_dtype, autocast = DTYPES[dtypes]
    model = tiny_quantized(dtype, **SHAPE)
    if kind == "own":
        hqqlora.add_lora(model, r=RANK, dtype=adapter_dtype)
    else:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapter_dtype)

    def step(ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    return model.train(), step


def dense_sizes(model):
    """Elements of the dense weights that the quantized ones stand for."""
    return {
        layer.in_features * layer.out_features
        for layer in model.modules()
        if isinstance(layer, hqqlora.HQQLinear)
    }


# ---- no dense weight -------------------------------------------------------------------


class Made(TorchDispatchMode):
    """Every floating-point tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.sizes = defaultdict(list)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.sizes[tensor.numel()].append(str(function))
        return result


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_operation_makes_a_dense_weight(kind, dtypes):
    model, step = adapted(kind, dtypes)
    with Made() as made:
        step(token_ids(2, 13))
    assert made.sizes  # it has seen the step
    for size in dense_sizes(model):
        assert size not in made.sizes, (size, made.sizes[size])


def test_a_dense_weight_would_be_seen():
    model, _ = adapted("own", "fp32")
    layer = next(m for m in model.modules() if isinstance(m, hqqlora.HQQLinear))
    with Made() as made:
        layer.dequantize()
    assert dense_sizes(model) & set(made.sizes)


@contextmanager
def allocations():
    """The sizes, in bytes, of all that torch allocates, inside operations too."""
    sizes = []
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        yield sizes
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.nbytes() > 0:
            sizes.append(event.nbytes())


@pytest.mark.parametrize(("batch", "length"), [(1, 3), (2, 13), (4, 32)])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_no_allocation_is_as_large_as_half_a_dense_weight(dtypes, batch, length):
    """Nor is the workspace of a kernel: for few rows, some and many."""
    model, step = adapted("own", dtypes)
    itemsize = DTYPES[dtypes][0].itemsize
    tokens = batch * length
    attention = 4 * batch * length**2 * 4
    logits = tokens * 64 * 4
    # rows of activations, in float32 where a norm or a kernel has them so; AMX tiles take
    # float32 in three parts of bfloat16
    rows = tokens * SHAPE["intermediate_size"] * 4
    if dtypes == "fp32" and c_library.library().hqq_isa_in_use(None) == ISAS["amx"]:
        rows = tokens * SHAPE["intermediate_size"] * 6
    with allocations() as sizes:
        step(token_ids(batch, length))
    largest = max(dense_sizes(model)) * itemsize
    beside = tokens * 2 * RANK * 4 + 64  # x A^T and dy B, in the workspace of a kernel
    allowed = max(rows + beside, attention, logits, largest // 2 + beside)
    assert max(sizes) <= allowed, max(sizes)
    assert max(sizes) < largest


# ---- nothing twice ---------------------------------------------------------------------


class Recorded(SavedActivations):
    """Each activation that is saved, with the layer that saves it."""

    def __init__(self, model):
        super().__init__(model)
        self.saved = []

    def _pack(self, tensor):
        saved = super()._pack(tensor)
        if saved.released is not None:
            self.saved.append((self._running[-1].name, saved.place, tensor.detach()))
        return saved

    def of(self, *endings):
        """What layers of these names saved: (storage, tensor)."""
        return [(place, t) for name, place, t in self.saved if name.endswith(endings)]


def record(model, step, ids):
    recorded = Recorded(model)
    with recorded.watch():
        step(ids)
    return recorded


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_saved_twice(kind, dtypes):
    """No two storages that the layers save hold the same numbers, in whatever dtype."""
    model, step = adapted(kind, dtypes)
    recorded = record(model, step, token_ids(2, 13))
    copies = defaultdict(set)
    for place, tensor in recorded.of("_proj"):
        if tensor.is_floating_point() and tensor.any():
            copies[tensor.float().numpy().tobytes()].add(place)
    assert len(copies) >= 2 * (4 + 7)  # x of qkv, o, gate and up, down; and seven xa
    assert max(map(len, copies.values())) == 1


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_keep_shared_inputs_and_xa_alone(kind, dtypes):
    """Of a block: the inputs of q, k and v, of o, of gate and up, of down, and seven xa; so no
    copy of an adapter, of a scale or of a bias."""
    model, step = adapted(kind, dtypes)
    tokens = 2 * 13
    recorded = record(model, step, token_ids(2, 13))
    storages = dict(recorded.of("_proj"))
    sizes = sorted(t.nbytes for t in storages.values())
    dtype, _, autocast = DTYPES[dtypes]
    itemsize = 2 if autocast else dtype.itemsize
    inputs = [tokens * HIDDEN * itemsize] * 3 + [tokens * SHAPE["intermediate_size"] * itemsize]
    assert sizes == sorted(2 * (inputs + [tokens * RANK * 4] * 7))


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", ["lora_A", "lora_"])
def test_x_is_not_kept_where_A_is_frozen(kind, dtypes, frozen):
    model, step = adapted(kind, dtypes)
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    model.enable_input_require_grads()
    recorded = record(model, step, token_ids(2, 13))
    shapes = [tuple(t.shape) for _, t in recorded.of("_proj")]
    assert shapes == ([(26, RANK)] * 14 if frozen == "lora_A" else [])


def test_without_an_adapter_nothing_is_kept():
    model = tiny_quantized(torch.bfloat16, **SHAPE).train()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    ids = token_ids(2, 13)
    recorded = record(
        model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss, ids
    )
    assert recorded.of("_proj") == []
    assert recorded.saved  # by norms and the rest


# ---- autocast's cast, shared -----------------------------------------------------------


@pytest.fixture
def two_layers():
    quant = hqqlora.BaseQuantizeConfig(nbits=4, group_size=32)
    layers = []
    for N in (32, 48):
        base = hqqlora.HQQLinear(nn.Linear(64, N), quant, compute_dtype=torch.float32)
        layers.append(hqqlora.LoRALinear(base, r=4, init_lora_weights=False))
    return layers


def run_with_autocast(layers, x):
    with torch.autocast("cpu", torch.bfloat16):
        return [layer(x) for layer in layers]


def test_gradients_through_a_shared_cast_are_those_of_separate_ones(two_layers):
    x = torch.randn(5, 64, requires_grad=True)
    ys = run_with_autocast(two_layers, x)
    sum(y.float().sin().sum() for y in ys).backward()
    shared = x.grad.clone()
    separate = torch.zeros_like(x)
    for layer in two_layers:
        own = x.detach().clone().requires_grad_()
        (y,) = run_with_autocast([layer], own)
        y.float().sin().sum().backward()
        separate += own.grad
    # each gradient is rounded to bfloat16, and so is the shared one's sum
    torch.testing.assert_close(shared, separate, rtol=2**-8, atol=2**-8 * separate.abs().max())


def test_an_input_changed_in_place_is_cast_again(two_layers):
    x = torch.randn(5, 64)
    with torch.no_grad():
        x_before = x.clone()
    with torch.autocast("cpu", torch.bfloat16):
        first = two_layers[0](x)
        x.mul_(2)
        second = two_layers[1](x)
    assert first.grad_fn is not None
    (expected,) = run_with_autocast(two_layers[1:], 2 * x_before)
    assert torch.equal(second, expected)


def test_a_cast_without_gradients_is_not_taken_where_there_are_some(two_layers):
    x = torch.randn(5, 64, requires_grad=True)
    with torch.no_grad():
        held = run_with_autocast(two_layers, x)
    held = run_with_autocast(two_layers, x)
    assert all(y.requires_grad for y in held)
    (gradient,) = torch.autograd.grad(sum(y.float().sum() for y in held), x)
    assert gradient.abs().min() > 0


def test_the_cast_keeps_no_input_alive(two_layers):
    import gc
    import weakref

    x = torch.randn(5, 64, requires_grad=True)
    ys = run_with_autocast(two_layers, x)
    alive = weakref.ref(x)
    del ys, x
    gc.collect()
    assert alive() is None
