"""3 bits in planes: exactly 3 bits a weight in memory; in all that is stored, hqq's words."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format_oracle import Format
from hqq_layers import assert_same_layer, dense_layer, quantized_layer
from op_arguments import ALL, call, forward_arguments, names_of
from oracle import Oracle, check_dgrad, check_linear, random_adapter, random_weight
from torch import nn

import hqqlora
from hqqlora import BaseQuantizeConfig, HQQLinear
from hqqlora.expert_weights import HQQExpertWeights
from hqqlora.ops import PackedWeight, planes_fit, planes_shape
from hqqlora.repacking import join_rows, take_columns, take_rows

ops = torch.ops.hqqlora
AXES = pytest.mark.parametrize("axis", [0, 1])
CONFIG = BaseQuantizeConfig(nbits=3, group_size=32)


def in_planes(weight: Oracle) -> PackedWeight:
    packed = weight.packed
    return packed._replace(W_q=ops.repack(packed.W_q, *packed[3:], True))


def layer_of(axis: int = 1, **options: Any) -> HQQLinear:
    return quantized_layer(nbits=3, group_size=32, axis=axis, **options)


def in_words(layer: HQQLinear) -> HQQLinear:
    words = copy.deepcopy(layer)
    words.repack(planes=False)
    assert words.W_q.dtype == torch.int32
    return words


def assert_holds_planes(layer: Any) -> None:
    assert layer.W_q.dtype == torch.uint8
    assert layer.W_q.numel() * 8 == 3 * layer.weight.numel()
    assert not layer.W_q.requires_grad


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """In every byte."""
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].shape == value.shape, key
        same = (t.detach().reshape(-1).view(torch.uint8) for t in (found[key], value))
        assert torch.equal(*same), key


# ---- the ops -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("N", "K", "G", "axis"), [(24, 40, 8, 1), (16, 9, 6, 1), (24, 40, 8, 0), (16, 5, 16, 0)]
)
def test_repack_is_the_format_there_and_back(N: int, K: int, G: int, axis: int) -> None:
    format_ = Format(N, K, G, 3, axis)
    codes = np.random.default_rng(1).integers(0, 8, (N, K), dtype=np.uint8)
    words = torch.from_numpy(format_.pack(codes))
    weight = (N, K, 3, G, axis)
    planes = ops.repack(words, *weight, True)
    assert planes.dtype == torch.uint8
    assert tuple(planes.shape) == planes_shape(*weight)
    assert torch.equal(planes, torch.from_numpy(format_.pack_planes(codes)))
    assert torch.equal(ops.repack(planes, *weight, True), planes)
    assert torch.equal(ops.repack(planes, *weight, False), words)
    assert torch.equal(ops.repack(words, *weight, False), words)


@AXES
@pytest.mark.parametrize("op", [*ALL, ops.repack], ids=str)
def test_opcheck(op: Any, axis: int) -> None:
    arguments: dict[str, Any] = forward_arguments(nbits=3, axis=axis)
    names = ("out_features", "in_features", "nbits", "group_size", "axis")
    weight = [arguments[name] for name in names]
    arguments["W_q"] = ops.repack(arguments["W_q"], *weight, True)
    arguments["planes"] = False
    keywords = {name: value for name, value in arguments.items() if name in names_of(op)}
    torch.library.opcheck(op.default, (), keywords)


@AXES
def test_products_of_planes(axis: int) -> None:
    torch.manual_seed(0)
    weight = random_weight(24, 40, 8, 3, axis)
    planes = in_planes(weight)
    assert torch.equal(Oracle(planes).codes, weight.codes)
    assert torch.equal(
        ops.dequantize(*planes, torch.float32), ops.dequantize(*weight.packed, torch.float32)
    )
    x, dy = torch.randn(7, 40), torch.randn(7, 24)
    check_linear(x, ops.linear(x, *planes[:3], None, *planes[3:]), weight)
    check_dgrad(dy, ops.linear_dgrad(dy, *planes), weight)


@AXES
def test_gradients_with_planes(axis: int) -> None:
    torch.manual_seed(0)
    weight = random_weight(24, 40, 8, 3, axis)
    adapter, dy = random_adapter(24, 40, 3), torch.randn(4, 24)
    inputs = [torch.randn(4, 40), adapter.A, adapter.B]
    x, A, B = (tensor.clone().requires_grad_() for tensor in inputs)
    y = hqqlora.autograd.lora_linear(x, in_planes(weight), None, A, B, adapter.scaling)
    adapter.check_backward(dy, inputs[0], torch.autograd.grad(y, (x, A, B), dy), weight)


@AXES
def test_experts_in_planes_compute_as_in_words(axis: int) -> None:
    torch.manual_seed(0)
    experts = [random_weight(24, 40, 8, 3, axis) for _ in range(3)]
    offsets, x = torch.tensor([0, 2, 2, 9]), torch.randn(9, 40)
    parts = [in_planes(expert) for expert in experts]
    stacked = [torch.stack(tensors) for tensors in list(zip(*parts, strict=True))[:3]]
    y = ops.grouped_linear(x, *stacked, offsets, *parts[0][3:])
    for e, expert in enumerate(experts):
        rows = slice(offsets[e], offsets[e + 1])
        check_linear(x[rows], y[rows], expert)


PLANES = in_planes(random_weight(24, 40, 8, 3, 1))
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"nbits": 4}, "W_q must have 480 elements"),
    ({"nbits": 4, "W_q": torch.zeros(60, 8, dtype=torch.uint8)}, "nbits must be 3 .* got 4"),
    ({"W_q": PLANES.W_q[1:]}, r"360 elements .* in planes, got shape \[44, 8\]"),
    ({"W_q": PLANES.W_q.T}, "W_q must be contiguous"),
    ({"W_q": PLANES.W_q.float()}, "int32, or uint8 in planes, for nbits = 3, got float32"),
    ({"group_size": 80}, "W_q is 3 bits in planes, for which 8 must .* groups = 12; int32"),
    (
        {"group_size": 80, "W_q": torch.zeros(2, 80, dtype=torch.int32)},
        "the result is 3 bits in planes, for which 8 must divide out_features = 24",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_repack_refuses(changes: dict[str, Any], message: str, device: str) -> None:
    arguments = {**PLANES._asdict(), "planes": True, **changes}
    arguments["W_q"] = arguments["W_q"].to(device)
    with pytest.raises(RuntimeError, match=message):
        call(ops.repack, arguments)


@pytest.mark.parametrize(
    ("weight", "fits"),
    [
        ((24, 40, 3, 8, 1), True),
        ((12, 40, 3, 8, 1), False),  # 8 rows of W to a byte
        ((24, 40, 3, 80, 1), False),  # 12 groups
        ((24, 40, 3, 12, 0), False),
        ((24, 40, 3, 24, 0), True),
        ((24, 40, 4, 8, 1), False),
    ],
)
def test_where_planes_fit(weight: tuple[int, int, int, int, int], fits: bool) -> None:
    assert planes_fit(*weight) == fits
    if not fits:
        with pytest.raises(ValueError, match="cannot be in planes"):
            planes_shape(*weight)


# ---- a layer -------------------------------------------------------------------------------


@AXES
@pytest.mark.parametrize("view_as_float", [False, True])
def test_a_layer_holds_planes_and_stores_hqqs_words(axis: int, view_as_float: bool) -> None:
    layer = layer_of(axis, view_as_float=view_as_float)
    assert_holds_planes(layer)
    weight = dense_layer().weight.detach()
    words, *_ = ops.quantize(weight, 3, 32, axis, torch.float32)
    stored = layer.state_dict()["W_q"]
    assert stored.dtype == (torch.float32 if view_as_float else torch.int32)
    assert torch.equal(stored.view(torch.int32), words)
    assert_same_state(layer.state_dict(), in_words(layer).state_dict())
    layer.state_dict_metadata = False
    assert torch.equal(layer.state_dict()["W_q"], words)


def test_what_planes_do_not_fit_stays_in_words() -> None:
    layer = quantized_layer(60, 64, nbits=3, group_size=32)
    assert layer.W_q.dtype == torch.int32
    layer.repack(planes=True)
    assert layer.W_q.dtype == torch.int32
    four = quantized_layer(nbits=4)
    before = four.W_q.data_ptr()
    four.repack(planes=True)
    four.repack(planes=False)
    assert four.W_q.data_ptr() == before
    with pytest.raises(RuntimeError, match="no weight yet"):
        HQQLinear(None, None).repack(planes=True)


@AXES
@pytest.mark.parametrize("assign", [False, True])
def test_loading(axis: int, assign: bool) -> None:
    """An old checkpoint: what it says is what a layer in words stores."""
    layer = layer_of(axis)
    state = in_words(layer).state_dict()
    for loaded in (
        HQQLinear(None, None),
        HQQLinear(dense_layer(seed=1), CONFIG, initialize=False, compute_dtype=torch.float32),
        quantized_layer(nbits=4, seed=1),
    ):
        loaded.load_state_dict(state, assign=assign)
        assert_holds_planes(loaded)
        assert_same_layer(loaded, layer)
    words = in_words(layer_of(axis, seed=1))
    words.load_state_dict(state, assign=assign)
    assert_same_layer(words, in_words(layer))  # a layer keeps the packing that it has
    from_planes = HQQLinear(None, None)
    from_planes.load_state_dict({**state, "W_q": layer.W_q}, assign=assign)
    assert_same_layer(from_planes, layer)


COPIES: dict[str, Callable[[HQQLinear], HQQLinear]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "half and back": lambda layer: copy.deepcopy(layer).half().float(),
    "requantize": lambda layer: requantized(copy.deepcopy(layer)),
}


def requantized(layer: HQQLinear) -> HQQLinear:
    layer.requantize(dense_layer().weight)
    return layer


@pytest.mark.parametrize("how", COPIES)
def test_a_layer_keeps_its_packing(how: str) -> None:
    layer = layer_of()
    copied = COPIES[how](layer)
    assert_holds_planes(copied)
    assert torch.equal(copied.W_q, layer.W_q)
    words = in_words(layer)
    assert torch.equal(COPIES[how](words).W_q, words.W_q)


def test_a_compiled_layer_takes_either_packing() -> None:
    layer = layer_of()
    x = torch.randn(5, 128, requires_grad=True)
    expected = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for planes in (True, False, True):
        layer.repack(planes)
        y = compiled(x)
        torch.testing.assert_close(y, expected)
        (grad,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(grad, layer.dequantize().sum(0).expand(5, 128))


def test_merging_and_its_way_back() -> None:
    base = layer_of()
    before = base.state_dict()
    layer = hqqlora.LoRALinear(base, r=2, init_lora_weights=False)
    layer.merge()
    assert_holds_planes(base)
    assert not torch.equal(base.state_dict()["W_q"], before["W_q"])
    stored = layer.state_dict()
    assert torch.equal(stored["base_layer.W_q"], before["W_q"])
    base.repack(planes=False)  # merged in another packing than it had before
    layer.unmerge()
    assert_same_state(base.state_dict(), before)


@AXES
def test_parts_of_planes_are_parts_of_words(axis: int) -> None:
    weight = random_weight(48, 64, 24 if axis == 0 else 16, 3, axis)
    planes = in_planes(weight)
    for take in (take_rows, take_columns):
        assert_same_weight(take(planes, 16, 32), take(weight.packed, 16, 32))
    parts = [take_rows(planes, 0, 16), take_rows(planes, 16, 48)]
    whole = join_rows(parts, weight.packed.group_size)
    assert torch.equal(Oracle(whole).codes, weight.codes)


def assert_same_weight(found: PackedWeight, expected: PackedWeight) -> None:
    assert found[3:] == expected[3:]
    for a, b in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(a, b)


# ---- models and files ----------------------------------------------------------------------


@AXES
def test_experts(axis: int) -> None:
    weight = torch.randn(3, 64, 128, generator=torch.Generator().manual_seed(1))
    config = BaseQuantizeConfig(nbits=3, group_size=32, axis=axis)
    experts = HQQExpertWeights.from_weights(weight, config)
    assert_holds_planes(experts)
    stored = experts.state_dict()
    words = [ops.quantize(w, 3, 32, axis, torch.float32)[0] for w in weight]
    assert torch.equal(stored["W_q"], torch.stack(words))
    other = HQQExpertWeights.from_weights(weight.flip(0), BaseQuantizeConfig(nbits=4))
    other.load_state_dict(stored)
    assert_holds_planes(other)
    assert torch.equal(other.W_q, experts.W_q)
    before = experts.dequantize()
    experts.repack(planes=False)
    assert experts.W_q.dtype == torch.int32
    assert torch.equal(experts.dequantize(), before)
    experts.load_state_dict(stored)
    experts.requantize(weight)
    assert torch.equal(experts.W_q, stored["W_q"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({**stored, "W_q": stored["W_q"][:, 1:]})


def test_a_model_counts_three_bits_and_saves_words(tmp_path: Path) -> None:
    model = nn.Sequential(dense_layer(64, 128), nn.ReLU(), dense_layer(128, 64))
    hqqlora.quantize_model(model, CONFIG, progress=False)
    report = hqqlora.memory_report(model)
    assert report.all.codes == 2 * 64 * 128 * 3 // 8
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["0.W_q"].dtype == torch.int32
    again = nn.Sequential(HQQLinear(None, None), nn.ReLU(), HQQLinear(None, None))
    again.load_state_dict(state)
    for layer, other in ((model[0], again[0]), (model[2], again[2])):
        assert_same_layer(layer, other)
