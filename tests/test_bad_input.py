"""Wrong arguments to the ops, to their fakes and to the differentiable functions: an exception
of the right type, with the offending values in its message, and no crash."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hqqlora
import hqqlora.autograd
from hqqlora.ops import PackedWeight

ops = torch.ops.hqqlora
NAN, INF = float("nan"), float("inf")
N, K, G, R, M = 24, 32, 16, 4, 5
FORMAT = {"out_features": N, "in_features": K, "nbits": 4, "group_size": G, "axis": 1}


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape with every other element of something twice as wide."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


# ---- the ops -------------------------------------------------------------------------------


def sound_arguments() -> dict:
    """Every argument of every op, as they fit together."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(N, K, generator=generator)
    W_q, scale, zero = ops.quantize(weight, 4, G, 1, torch.float32)
    options = {"solver": 0, "iters": 20, "early_stop": True, "round_zero": False}
    options |= {"lp_norm": 0.7, "beta": 10.0, "kappa": 1.0}
    return {
        **FORMAT,
        **options,
        "weight": weight,
        "importance": torch.rand(K, generator=generator),
        "meta_dtype": torch.float32,
        "dtype": torch.float32,
        "W_q": W_q,
        "scale": scale,
        "zero": zero,
        "x": torch.randn(M, K, generator=generator),
        "dy": torch.randn(M, N, generator=generator),
        "xa": torch.randn(M, R, generator=generator),
        "bias": torch.randn(N, generator=generator),
        "A": torch.randn(R, K, generator=generator),
        "B": torch.randn(N, R, generator=generator),
        "seed": torch.tensor([7]),
        "scaling": 0.5,
        "dropout": 0.25,
        "needs_dx": True,
        "needs_dA": True,
        "needs_dB": True,
    }


SOUND = sound_arguments()
W_Q, SCALE, X = SOUND["W_q"], SOUND["scale"], SOUND["x"]
OPS = (
    "quantize",
    "dequantize",
    "linear",
    "linear_dgrad",
    "lora_linear",
    "lora_linear_backward",
)
NAMES = {op: [a.name for a in getattr(ops, op).default._schema.arguments] for op in OPS}

# argument(s) changed -> what the message must show; for every op that has the first of them
BAD_FORMATS = [
    ({"nbits": 5}, ["nbits", "5"]),
    ({"nbits": 0}, ["nbits", "0"]),
    ({"nbits": -4}, ["nbits", "-4"]),
    ({"nbits": 2**32 + 4}, ["nbits", "4294967300"]),
    ({"axis": 2}, ["axis", "2"]),
    ({"axis": -1}, ["axis", "-1"]),
    ({"axis": 2**32 + 1}, ["axis", "4294967297"]),
    ({"group_size": 0}, ["group_size", "0"]),
    ({"group_size": -16}, ["group_size", "-16"]),
    ({"group_size": -(2**63)}, ["group_size", "-9223372036854775808"]),
    ({"group_size": 7}, ["group_size", "7", "24", "32"]),
    ({"group_size": 2**63 - 1}, ["group_size", "9223372036854775807"]),
]
BAD_WEIGHTS = [
    ({"out_features": N + 1}, ["25", "32"]),
    ({"out_features": -N}, ["-24"]),
    ({"in_features": K // 2}, ["24", "16"]),
    ({"in_features": -K}, ["-32"]),
    ({"out_features": -N, "in_features": -K}, ["-24", "-32"]),
    ({"out_features": 2**40, "in_features": 2**40}, ["1099511627776"]),
    ({"out_features": 2**62, "in_features": 2}, ["4611686018427387904"]),
    ({"out_features": 2**30, "in_features": 2**26}, ["1073741824", "67108864"]),
    ({"nbits": 8}, ["W_q", "8", str(list(W_Q.shape))]),
    ({"nbits": 3}, ["W_q", "288", "in planes", str(list(W_Q.shape))]),
    ({"nbits": 3, "W_q": W_Q.short()}, ["W_q", "int32", "uint8 in planes", "int16"]),
    ({"nbits": 3, "group_size": 32}, ["W_q", "288", "in planes"]),
    ({"nbits": 3, "group_size": 64}, ["W_q", "planes", "24", "groups = 12"]),
    ({"nbits": 3, "axis": 0, "group_size": 12}, ["W_q", "planes", "24", "group_size = 12"]),
    ({"nbits": 3, "out_features": 12}, ["W_q", "planes", "12", "groups = 24"]),
    ({"W_q": W_Q.int()}, ["W_q", "int32"]),
    ({"W_q": W_Q.to(torch.int8)}, ["W_q", "int8"]),
    ({"W_q": W_Q.float()}, ["W_q", "float32"]),
    ({"W_q": W_Q[:-1].clone()}, ["W_q", "23", "384"]),
    ({"W_q": W_Q[:0]}, ["W_q", "0", "384"]),
    ({"W_q": strided(W_Q)}, ["W_q", "contiguous", str(list(strided(W_Q).stride()))]),
    ({"W_q": W_Q.t().contiguous().t()}, ["W_q", "contiguous", "[1, 24]"]),
    ({"W_q": W_Q[:1, :1].expand(W_Q.shape)}, ["W_q", "contiguous", "[0, 0]"]),
    ({"scale": SCALE.int()}, ["scale", "int32"]),
    ({"scale": SCALE.double()}, ["scale", "float64"]),
    ({"scale": SCALE.half()}, ["zero", "float16", "float32"]),
    ({"scale": SCALE[:-1].clone()}, ["scale", "48", "[47, 1]"]),
    ({"zero": SCALE.bfloat16()}, ["zero", "bfloat16", "float32"]),
    ({"zero": SCALE[:1].clone()}, ["zero", "48", "[1, 1]"]),
    ({"zero": strided(SCALE.flatten())}, ["zero", "contiguous", "[2]"]),
    ({"zero": SCALE[:1].expand(SCALE.shape)}, ["zero", "contiguous", "[0, "]),
]
BAD_PRODUCTS = [
    ({"x": X[:, :-1]}, ["x", "32", "[5, 31]"]),
    ({"x": torch.randn(K, M)}, ["x", "32", "[32, 5]"]),
    ({"x": torch.tensor(1.0)}, ["x", "32", "[]"]),
    ({"x": torch.zeros(0)}, ["x", "32", "[0]"]),
    ({"x": X.double()}, ["x", "float64"]),
    ({"x": X.long()}, ["x", "int64"]),
    ({"x": X.bool()}, ["x", "bool"]),
    ({"x": X.to(torch.complex64)}, ["x", "complex64"]),
    ({"dy": SOUND["dy"][:, 1:]}, ["dy", "24", "[5, 23]"]),
    ({"dy": SOUND["dy"].double()}, ["dy", "float64"]),
    ({"dy": torch.tensor(1.0)}, ["dy", "24", "[]"]),
    ({"bias": torch.randn(N - 1)}, ["bias", "24", "[23]"]),
    ({"bias": torch.randn(N, 1)}, ["bias", "24", "[24, 1]"]),
    ({"bias": torch.randn(N).half()}, ["bias", "float16", "float32"]),
    ({"bias": torch.randn(N).double()}, ["bias", "float64"]),
]
BAD_ADAPTERS = [
    ({"A": torch.randn(R, K + 1)}, ["A", "32", "[4, 33]"]),
    ({"A": torch.randn(K)}, ["A", "32", "[32]"]),
    ({"A": torch.randn(1, R, K)}, ["A", "32", "[1, 4, 32]"]),
    ({"A": torch.randn(R, K).half()}, ["A", "float16", "float32"]),
    ({"A": torch.randn(R, K).double()}, ["A", "float64"]),
    ({"A": torch.randn(257, K), "B": torch.randn(N, 257)}, ["256", "257"]),
    ({"B": torch.randn(R, N)}, ["B", "[24, 4]", "[4, 24]"]),
    ({"B": torch.randn(N, R + 1)}, ["B", "[24, 4]", "[24, 5]"]),
    ({"B": torch.randn(N, R).half()}, ["B", "float16", "float32"]),
    ({"scaling": NAN}, ["scaling", "nan"]),
    ({"scaling": -INF}, ["scaling", "-inf"]),
    ({"dropout": 1.0}, ["dropout", "1"]),
    ({"dropout": -0.5}, ["dropout", "-0.5"]),
    ({"dropout": NAN}, ["dropout", "nan"]),
    ({"seed": None}, ["seed", "0.25"]),
    ({"seed": torch.tensor([1, 2])}, ["seed", "[2]"]),
    ({"seed": torch.tensor([], dtype=torch.int64)}, ["seed", "[0]"]),
    ({"seed": torch.tensor([7], dtype=torch.int32)}, ["seed", "int32"]),
    ({"seed": torch.tensor([7.0])}, ["seed", "float32"]),
]
BAD_BACKWARDS = [
    ({"needs_dA": True, "x": None}, ["dA", "x"]),
    ({"needs_dB": True, "needs_dA": False, "x": None, "xa": None}, ["dB", "xa"]),
    ({"needs_dx": True, "x": torch.randn(M + 1, K)}, ["x", "5", "[6, 32]"]),
    ({"needs_dx": True, "x": torch.randn(M, K).bfloat16()}, ["bfloat16", "float32"]),
    ({"xa": torch.randn(M + 1, R)}, ["xa", "[5, 4]", "[6, 4]"]),
    ({"xa": torch.randn(M, R - 1)}, ["xa", "[5, 4]", "[5, 3]"]),
    ({"xa": torch.randn(M, R).half()}, ["xa", "float16"]),
]
BAD_QUANTIZING = [
    ({"weight": torch.randn(K)}, ["weight", "[32]"]),
    ({"weight": torch.randn(2, 3, 4)}, ["weight", "[2, 3, 4]"]),
    ({"weight": torch.randn(N, K).double()}, ["weight", "float64"]),
    ({"weight": torch.ones(N, K, dtype=torch.int32)}, ["weight", "int32"]),
    ({"meta_dtype": torch.float64}, ["meta_dtype", "float64"]),
    ({"meta_dtype": torch.int8}, ["meta_dtype", "int8"]),
    ({"dtype": torch.float64}, ["dtype", "float64"]),
    ({"dtype": torch.uint8}, ["dtype", "uint8"]),
    ({"solver": 3}, ["solver", "3"]),
    ({"solver": -1}, ["solver", "-1"]),
    ({"iters": 0}, ["iters", "0"]),
    ({"iters": 2**40}, ["iters", "1099511627776"]),
    ({"lp_norm": 0.0}, ["lp_norm", "0"]),
    ({"lp_norm": NAN}, ["lp_norm", "nan"]),
    ({"beta": -1.0}, ["beta", "-1"]),
    ({"beta": INF}, ["beta", "inf"]),
    ({"kappa": 0.0}, ["kappa", "0"]),
]
TABLES = [BAD_FORMATS, BAD_PRODUCTS, BAD_ADAPTERS, BAD_BACKWARDS, BAD_QUANTIZING]
CASES = [
    pytest.param(op, changes, shows, id=f"{op}-{i}-{'-'.join(changes)}")
    for op in OPS
    for table in TABLES + [BAD_WEIGHTS] * ("W_q" in NAMES[op])
    for i, (changes, shows) in enumerate(table)
    if next(iter(changes)) in NAMES[op]
]


def call(op: str, changes: dict):
    arguments = {name: {**SOUND, **changes}[name] for name in NAMES[op]}
    return getattr(ops, op)(**arguments)


def assert_shows(error: BaseException, shows: list[str]) -> None:
    message = str(error)
    assert all(part in message for part in shows), f"{shows} not all in: {message}"


def test_the_sound_arguments_are_sound():
    for op in OPS:
        call(op, {})


@pytest.mark.parametrize(("op", "changes", "shows"), CASES)
def test_ops_refuse(op, changes, shows):
    with pytest.raises(RuntimeError) as refusal:
        call(op, changes)
    assert_shows(refusal.value, shows)
    assert str(refusal.value).startswith("hqqlora: ")
    assert "\n" not in str(refusal.value)


# the quantizer's options are checked when it runs: it is not traced in training
WHEN_RUN = {"iters", "lp_norm", "beta", "kappa"}
KNOWN_TO_FAKES = [case for case in CASES if WHEN_RUN.isdisjoint(case.values[1])]


@pytest.mark.parametrize(("op", "changes", "shows"), KNOWN_TO_FAKES)
def test_fakes_refuse_in_the_same_words(op, changes, shows):
    with pytest.raises(RuntimeError) as real:
        call(op, changes)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError) as fake:
        call(op, changes)
    assert_shows(fake.value, shows)
    assert str(real.value) in str(fake.value)


OTHER_KINDS = {
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: t.float().reshape(t.shape[0], -1).to_sparse_csr(),
    "mkldnn": lambda t: t.float().to_mkldnn(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize(
    ("op", "name"),
    [(op, n) for op in OPS for n in NAMES[op] if isinstance(SOUND[n], torch.Tensor)],
)
def test_tensors_of_other_kinds(op, name, kind):
    """One tensor that is not an ordinary CPU tensor, in each place."""
    with pytest.raises(RuntimeError, match="hqqlora"):  # NotImplementedError is one
        call(op, {name: OTHER_KINDS[kind](SOUND[name])})


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_quantize_refuses_what_is_not_finite(value, dtype):
    for solver in hqqlora.ops.Solver:
        for axis in (0, 1):
            weight = torch.randn(N, K).to(dtype)
            weight[17, 9] = value
            with pytest.raises(RuntimeError) as refusal:
                ops.quantize(weight, 4, 8, axis, torch.float32, int(solver))
            assert_shows(refusal.value, ["17", "9"])


def test_more_rows_than_memory_holds():
    """2^40 rows are one row in memory, seen many times; the result would not be."""
    for rows in (2**40, 2**57):
        with pytest.raises(RuntimeError):
            call("linear", {"x": X[:1].expand(rows, K)})
        with pytest.raises(RuntimeError):
            call("linear_dgrad", {"dy": SOUND["dy"][:1].expand(rows, N)})


def test_lazily_negated_and_conjugated_inputs_are_what_they_seem():
    expected = call("linear", {"x": -X})
    assert torch.equal(call("linear", {"x": X._neg_view()}), expected)
    imaginary = torch.complex(torch.zeros_like(X), X).conj().imag  # -X, by a flag alone
    assert torch.equal(call("linear", {"x": imaginary}), expected)


def test_wrong_python_types():
    """torch's own dispatcher answers."""
    with pytest.raises((RuntimeError, TypeError), match="nbits"):
        call("linear", {"nbits": "four"})
    with pytest.raises((RuntimeError, TypeError), match="x"):
        call("linear", {"x": [1.0, 2.0]})
    with pytest.raises((RuntimeError, TypeError), match=r"out_features|dimension"):
        ops.linear(X, W_Q, SCALE, SOUND["zero"])
    with pytest.raises((RuntimeError, TypeError, OverflowError)):
        call("linear", {"nbits": 2**64})


# ---- the differentiable functions -----------------------------------------------------------

WEIGHT = PackedWeight(W_Q, SCALE, SOUND["zero"], N, K, 4, G, 1)


def test_autograd_functions_refuse():
    lora_linear = hqqlora.autograd.lora_linear
    A, B = SOUND["A"].clone().requires_grad_(), SOUND["B"]
    x = X.clone().requires_grad_()
    for attempt, shows in [
        (lambda: hqqlora.autograd.linear(x[:, :9], WEIGHT), ["x", "32", "[5, 9]"]),
        (lambda: hqqlora.autograd.linear(x, WEIGHT, B), ["bias", "[24, 4]"]),
        (lambda: lora_linear(x, WEIGHT, None, A.long(), B, 1.0), ["A", "int64"]),
        (lambda: lora_linear(x, WEIGHT, None, A, B.t(), 1.0), ["B", "[4, 24]"]),
        (lambda: lora_linear(x, WEIGHT, None, A, B, 1.0, dropout=1.5), ["dropout", "1.5"]),
        (lambda: lora_linear(x, WEIGHT, None, A, B, NAN), ["scaling", "nan"]),
        (lambda: lora_linear(x, WEIGHT._replace(nbits=2), None, A, B, 1.0), ["W_q", "2"]),
    ]:
        with pytest.raises((RuntimeError, ValueError)) as refusal:
            attempt()
        assert_shows(refusal.value, shows)


def test_the_frozen_weight_has_no_gradient():
    trainable = WEIGHT._replace(scale=SCALE.clone().requires_grad_())
    with pytest.raises(ValueError, match="frozen"):
        hqqlora.autograd.linear(X, trainable)


def test_second_derivatives_are_refused():
    x = X.clone().requires_grad_()
    y = hqqlora.autograd.linear(x, WEIGHT)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"hqqlora|differentiat"):
        dx.sum().backward()


def test_errors_while_compiling():
    """The message of the op reaches the user of torch.compile."""

    @torch.compile(backend="eager", fullgraph=True)
    def f(x):
        return hqqlora.autograd.linear(x, WEIGHT)

    with pytest.raises(Exception, match=r"x must have a last dimension of in_features = 32"):
        f(torch.randn(3, 31))
