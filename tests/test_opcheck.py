"""torch's own checks of a custom op (schema, fakes, tracing with dynamic shapes), and the words
of the errors: the same from the kernels and from the fakes."""

import re

import pytest
import torch
from op_arguments import ALL, call, forward_arguments, names_of
from torch._subclasses.fake_tensor import FakeTensorMode

import hqqlora.ops

ops = torch.ops.hqqlora


@pytest.mark.parametrize("op", ALL, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nbits": 3, "axis": 0, "dtype": torch.bfloat16, "dropout": 0.25},
        {"nbits": 2, "M": 0},
    ],
    ids=["plain", "3 bits, axis 0, bfloat16, dropout", "no rows"],
)
def test_opcheck(op, options):
    arguments = forward_arguments(**options)
    if not options:  # what the checks see in training code: inputs that are not contiguous
        arguments["x"] = arguments["x"].transpose(0, 1)
    names = names_of(op)
    keywords = {name: value for name, value in arguments.items() if name in names}
    torch.library.opcheck(op.default, (), keywords)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3]
)
def test_opcheck_with_some_gradients(needs):
    arguments = forward_arguments()
    arguments |= dict(zip(("needs_dx", "needs_dA", "needs_dB"), needs, strict=True))
    if not needs[1]:
        arguments["x"] = None
    if not needs[2]:
        arguments["xa"] = None
    names = names_of(ops.lora_linear_backward)
    keywords = {name: value for name, value in arguments.items() if name in names}
    torch.library.opcheck(ops.lora_linear_backward.default, (), keywords)


def test_meta_tensors():
    arguments = forward_arguments()
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    for op in ALL:
        expected, shapes = call(op, arguments), call(op, meta)
        if isinstance(expected, torch.Tensor):
            expected, shapes = (expected,), (shapes,)
        for real, shape in zip(expected, shapes, strict=True):
            assert shape.device.type == "meta"
            assert (real.shape, real.dtype) == (shape.shape, shape.dtype)
            assert real.stride() == shape.stride()


def half(t):
    return t.half()


# op, what to change (a value, or a function of the old one), the message
MISTAKES = [
    (ops.linear, {"nbits": 5}, "nbits must be 8, 4, 3, 2 or 1, got 5"),
    (ops.linear, {"nbits": 2**32 + 4}, "nbits must be 8, 4, 3, 2 or 1, got 4294967300"),
    (ops.linear, {"axis": 2}, "axis must be 0 or 1, got 2"),
    (ops.linear, {"group_size": 0}, "group_size must be positive, got 0"),
    (
        ops.linear,
        {"group_size": 7},
        "group_size 7 does not divide out_features * in_features = 24 * 40",
    ),
    (
        ops.linear,
        {"out_features": -1},
        "out_features and in_features must not be negative, got -1 and 40",
    ),
    (
        ops.linear,
        {"out_features": 2**40, "in_features": 2**40},
        "out_features * in_features = 1099511627776 * 1099511627776 does not fit in 64 bits",
    ),
    (ops.linear, {"W_q": torch.Tensor.int}, "W_q must be uint8 for nbits = 4, got int32"),
    (
        ops.linear,
        {"W_q": lambda W_q: W_q[:-1]},
        "W_q must have 480 elements for out_features = 24, in_features = 40, nbits = 4, "
        "group_size = 8, axis = 1, got shape [59, 8]",
    ),
    (
        ops.linear,
        {"W_q": lambda W_q: W_q.T.contiguous().T},
        "W_q must be contiguous, got shape [60, 8] and strides [1, 60]",
    ),
    (
        ops.linear,
        {"nbits": 3},
        "W_q must have 360 elements for out_features = 24, in_features = 40, nbits = 3, "
        "group_size = 8, axis = 1, in planes, got shape [60, 8]",
    ),
    (
        ops.linear,
        {"nbits": 3, "W_q": torch.Tensor.long},
        "W_q must be int32, or uint8 in planes, for nbits = 3, got int64",
    ),
    (
        ops.linear,
        {"nbits": 3, "group_size": 80},
        "W_q is 3 bits in planes, for which 8 must divide out_features = 24 and the number of "
        "groups = 12; int32 words hold any weight",
    ),
    (
        ops.linear,
        {"scale": torch.Tensor.double},
        "scale must be float32, float16 or bfloat16, got float64",
    ),
    (ops.linear, {"zero": half}, "zero must have the dtype of scale, float32, got float16"),
    (
        ops.linear,
        {"scale": lambda s: s[:7]},
        "scale must have one element for each of the 120 groups, got shape [7, 1]",
    ),
    (
        ops.linear,
        {"zero": lambda z: z[:8]},
        "zero must have one element for each of the 120 groups, got shape [8, 1]",
    ),
    (
        ops.linear,
        {"zero": lambda z: z.repeat(1, 2)[:, :1]},
        "zero must be contiguous, got shape [120, 1] and strides [2, 1]",
    ),
    (
        ops.linear,
        {"x": torch.Tensor.double},
        "x must be float32, float16 or bfloat16, got float64",
    ),
    (
        ops.linear,
        {"x": lambda x: x[..., :39]},
        "x must have a last dimension of in_features = 40, got shape [2, 5, 39]",
    ),
    (
        ops.linear,
        {"x": lambda x: x[0, 0, 0]},
        "x must have a last dimension of in_features = 40, got shape []",
    ),
    (ops.linear, {"bias": half}, "bias must be float32 or float32 as x, got float16"),
    (ops.linear, {"bias": lambda b: b[:3]}, "bias must have shape [24], got [3]"),
    (
        ops.linear_dgrad,
        {"dy": lambda dy: dy[..., 1:]},
        "dy must have a last dimension of out_features = 24, got shape [2, 5, 23]",
    ),
    (
        ops.dequantize,
        {"dtype": torch.int8},
        "dtype must be float32, float16 or bfloat16, got int8",
    ),
    (
        ops.quantize,
        {"weight": lambda w: w[0]},
        "weight must have shape [out_features, in_features], got [40]",
    ),
    (
        ops.quantize,
        {"weight": torch.Tensor.long},
        "weight must be float32, float16 or bfloat16, got int64",
    ),
    (
        ops.quantize,
        {"meta_dtype": torch.float64},
        "meta_dtype must be float32, float16 or bfloat16, got float64",
    ),
    (
        ops.quantize,
        {"solver": 3},
        "solver must be 0 (default), 1 (reference) or 2 (minmax), got 3",
    ),
    (ops.quantize, {"iters": -1}, "iters must be 0 to 2147483647, got -1"),
    (
        ops.quantize,
        {"importance": torch.ones(40, dtype=torch.float64)},
        "importance must be float32, got float64",
    ),
    (
        ops.quantize,
        {"importance": torch.ones(39)},
        "importance must have shape [in_features] = [40], got [39]",
    ),
    (
        ops.quantize,
        {"importance": torch.ones(40), "solver": 1},
        "options.importance needs the default solver (0); options.solver is 1",
    ),
    (ops.lora_linear, {"A": half}, "A must be float32 or float32 as x, got float16"),
    (
        ops.lora_linear,
        {"B": torch.Tensor.bfloat16},
        "B must have the dtype of A, float32, got bfloat16",
    ),
    (
        ops.lora_linear,
        {"A": lambda A: A[:, 1:]},
        "A must have shape [R, in_features = 40], got [3, 39]",
    ),
    (ops.lora_linear, {"B": lambda B: B[1:]}, "B must have shape [24, 3], got [23, 3]"),
    (
        ops.lora_linear,
        {"A": lambda A: A.repeat(100, 1)},
        "the rank of A must be at most 256, got 300",
    ),
    (ops.lora_linear, {"scaling": float("inf")}, "scaling must be finite, got inf"),
    (
        ops.lora_linear,
        {"dropout": 1.0},
        "dropout must be at least 0 and below 1, got 1",
    ),
    (
        ops.lora_linear,
        {"dropout": -0.25},
        "dropout must be at least 0 and below 1, got -0.25",
    ),
    (ops.lora_linear, {"dropout": 0.1}, "dropout = 0.1 needs a seed"),
    (
        ops.lora_linear,
        {"dropout": 0.1, "seed": torch.tensor([1, 2])},
        "seed must be an int64 tensor of one element, got int64 of shape [2]",
    ),
    (
        ops.lora_linear,
        {"dropout": 0.1, "seed": torch.tensor([1.0])},
        "seed must be an int64 tensor of one element, got float32 of shape [1]",
    ),
    (ops.lora_linear_backward, {"A": half}, "A must be float32 or float32 as dy, got float16"),
    (ops.lora_linear_backward, {"x": None}, "dA needs x"),
    (
        ops.lora_linear_backward,
        {"x": None, "xa": None, "needs_dA": False},
        "dB needs xa or x",
    ),
    (
        ops.lora_linear_backward,
        {"x": half},
        "x must have the dtype of dy, float32, got float16",
    ),
    (
        ops.lora_linear_backward,
        {"x": lambda x: x[:1]},
        "x must have as many rows as dy, 10, got shape [1, 5, 40]",
    ),
    (ops.lora_linear_backward, {"xa": half}, "xa must be float32, got float16"),
    (
        ops.lora_linear_backward,
        {"xa": lambda xa: xa[1:]},
        "xa must have shape [10, 3], got [9, 3]",
    ),
    (ops.lora_project, {"A": lambda A: A[0]}, "A must have shape [R, in_features], got [40]"),
    (
        ops.lora_project,
        {"x": lambda x: x[..., 1:]},
        "x must have a last dimension of in_features = 40, got shape [2, 5, 39]",
    ),
    (ops.lora_project, {"A": half}, "A must be float32 or float32 as x, got float16"),
    (
        ops.lora_project,
        {"A": torch.randn(257, 40)},
        "the rank of A must be at most 256, got 257",
    ),
    (
        ops.lora_linear_from_xa,
        {"B": lambda B: B[1:]},
        "B must have shape [out_features = 24, R], got [23, 3]",
    ),
    (ops.lora_linear_from_xa, {"xa": half}, "xa must be float32, got float16"),
    (
        ops.lora_linear_from_xa,
        {"xa": lambda xa: xa[:, 1:]},
        "xa must have shape [10, 3], got [10, 2]",
    ),
    (ops.lora_linear_from_xa, {"scaling": float("inf")}, "scaling must be finite, got inf"),
    (ops.lora_factor_gradients, {"xa": None}, "dB needs xa"),
    (
        ops.lora_factor_gradients,
        {"dy": lambda dy: dy[..., 1:]},
        "dy must have a last dimension of out_features = 24, got shape [2, 5, 23]",
    ),
    (
        ops.lora_input_gradients,
        {"dyb": lambda dyb: dyb[1:]},
        "dyb must have shape [10, 3], got [9, 3]",
    ),
    (
        ops.lora_input_gradients,
        {"A": lambda A: A[:, 1:]},
        "A must have shape [R, in_features = 40], got [3, 39]",
    ),
    (ops.lora_input_gradients, {"x": None}, "dA needs x"),
]


@pytest.mark.parametrize(
    ("op", "changes", "message"), MISTAKES, ids=[message for _, _, message in MISTAKES]
)
def test_mistakes_are_named_with_their_values(op, changes, message):
    arguments = forward_arguments()
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    exactly = f"^hqqlora: {re.escape(message)}$"
    with pytest.raises(RuntimeError, match=exactly):
        call(op, arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        with pytest.raises(RuntimeError, match=exactly):
            call(op, fake)


def test_shapes_of_impossible_weights_are_refused():
    for nbits, group_size, axis in ((5, 8, 1), (4, 7, 1), (4, 0, 1), (4, 8, 2)):
        with pytest.raises(ValueError, match=r"must be|does not divide"):
            hqqlora.ops.packed_shape(24, 40, nbits, group_size, axis)
    with pytest.raises(ValueError, match="does not divide"):
        hqqlora.ops.meta_shape(24, 40, 7, 1)
    with pytest.raises(ValueError, match="axis"):
        hqqlora.ops.meta_shape(24, 40, 8, 2)
