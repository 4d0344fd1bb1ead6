"""Wrong arguments to configurations, layers and models: an exception of the right type, with
the offending values in its message; and what was there before is still there."""

import inspect

import pytest
import torch
from torch import nn

import hqqlora
from hqqlora import BaseQuantizeConfig, HQQLinear, LoRALinear

NAN, INF = float("nan"), float("inf")
N, K, G, M = 24, 32, 16, 5
X = torch.randn(M, K)
CONFIG = BaseQuantizeConfig(nbits=4, group_size=G)


def assert_shows(error: BaseException, shows: list[str]) -> None:
    message = str(error)
    assert all(part in message for part in shows), f"{shows} not all in: {message}"


BAD_CONFIGS = [
    ({"nbits": 5}, ValueError, ["nbits", "5"]),
    ({"nbits": 1.58}, ValueError, ["nbits", "1.58"]),
    ({"nbits": NAN}, (TypeError, ValueError), ["nbits", "nan"]),
    ({"nbits": "4"}, TypeError, ["nbits", "'4'"]),
    ({"nbits": True}, TypeError, ["nbits", "True"]),
    ({"group_size": 0}, ValueError, ["group_size", "0"]),
    ({"group_size": -64}, ValueError, ["group_size", "-64"]),
    ({"group_size": 64.5}, TypeError, ["group_size", "64.5"]),
    ({"group_size": INF}, (TypeError, ValueError), ["group_size", "inf"]),
    ({"axis": 2}, ValueError, ["axis", "2"]),
    ({"axis": None}, TypeError, ["axis", "None"]),
    ({"quant_zero": True}, ValueError, ["quant_zero", "True"]),
    ({"quant_scale": True}, ValueError, ["quant_scale", "True"]),
    ({"offload_meta": True}, ValueError, ["offload_meta", "True"]),
    ({"solver": "best"}, ValueError, ["solver", "'best'"]),
    ({"solver": None}, ValueError, ["solver", "None"]),
    ({"optimize": 1}, TypeError, ["optimize", "1"]),
    ({"view_as_float": "no"}, TypeError, ["view_as_float", "'no'"]),
]


@pytest.mark.parametrize(("arguments", "kind", "shows"), BAD_CONFIGS, ids=str)
def test_configurations(arguments, kind, shows):
    with pytest.raises(kind) as refusal:
        BaseQuantizeConfig(**arguments)
    assert_shows(refusal.value, shows)


def layer_with(value: float) -> nn.Linear:
    layer = nn.Linear(K, N)
    layer.weight.data[3, 5] = value
    return layer


BAD_LAYERS = [
    (lambda: HQQLinear(nn.Conv1d(K, N, 1), CONFIG), TypeError, ["Conv1d"]),
    (lambda: HQQLinear("layer", CONFIG), TypeError, ["str"]),
    (lambda: HQQLinear(nn.Linear(K, N), None), ValueError, ["quant_config"]),
    (lambda: HQQLinear(nn.Linear(K, N), "4bit"), TypeError, ["str"]),
    (lambda: HQQLinear(nn.Linear(K, N), {"bits": 4}), ValueError, ["bits"]),
    (lambda: HQQLinear(nn.Linear(K, N), CONFIG, compute_dtype=torch.int8), TypeError, ["int8"]),
    (lambda: HQQLinear(nn.Linear(K, N), CONFIG, meta_dtype=torch.float64), TypeError, ["64"]),
    (lambda: HQQLinear(nn.Linear(K, N).double(), CONFIG), TypeError, ["float64"]),
    (lambda: HQQLinear(nn.Linear(K, N, device="meta"), CONFIG), TypeError, ["meta"]),
    (lambda: HQQLinear(nn.Linear(9, 7), CONFIG), ValueError, ["16", "63", "[7, 9]"]),
    (lambda: HQQLinear(layer_with(NAN), CONFIG), ValueError, ["[3, 5]", "nan"]),
    (lambda: HQQLinear(layer_with(-INF), CONFIG), ValueError, ["[3, 5]", "-inf"]),
    (lambda: HQQLinear(None, None)(X), RuntimeError, []),
    (lambda: HQQLinear(nn.Linear(K, N), CONFIG)(X[:, 1:]), RuntimeError, ["32", "[5, 31]"]),
    (lambda: HQQLinear(nn.Linear(K, N), CONFIG)(X.double()), RuntimeError, ["float64"]),
    (lambda: LoRALinear(nn.Linear(K, N)), TypeError, ["Linear"]),
    (lambda: lora_layer(r=0), ValueError, ["r", "0"]),
    (lambda: lora_layer(r=257), ValueError, ["257", "256"]),
    (lambda: lora_layer(r=4.5), TypeError, ["4.5"]),
    (lambda: lora_layer(lora_alpha=NAN), ValueError, ["lora_alpha", "nan"]),
    (lambda: lora_layer(lora_dropout=1.0), ValueError, ["lora_dropout", "1"]),
    (lambda: lora_layer(lora_dropout=-0.1), ValueError, ["lora_dropout", "-0.1"]),
    (lambda: lora_layer(dtype=torch.float64), TypeError, ["float64"]),
    (lambda: lora_layer(init_lora_weights="pissa"), ValueError, ["'pissa'"]),
]


def lora_layer(**options) -> LoRALinear:
    return LoRALinear(HQQLinear(nn.Linear(K, N), CONFIG), **options)


@pytest.mark.parametrize(
    ("attempt", "kind", "shows"),
    BAD_LAYERS,
    ids=[inspect.getsource(case[0]).strip()[1:60] for case in BAD_LAYERS],
)
def test_layers(attempt, kind, shows):
    with pytest.raises(kind) as refusal:
        attempt()
    assert_shows(refusal.value, shows)


def test_a_layer_that_cannot_be_quantized_is_left_whole():
    for layer, config in (
        (layer_with(NAN), CONFIG),
        (nn.Linear(K, N), BaseQuantizeConfig(group_size=7)),
    ):
        before = layer.weight.detach().clone()
        with pytest.raises(ValueError, match=r"NaN|nan|7"):
            HQQLinear(layer, config)
        assert isinstance(layer.weight, nn.Parameter)
        assert torch.equal(layer.weight.nan_to_num(), before.nan_to_num())


def test_a_model_is_changed_as_documented():
    """A group size that does not fit is found before any layer is touched; a weight that is
    not finite names its layer, and the layers after it are still dense."""
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, 9))
    with pytest.raises(ValueError, match=r"^1\b.*\b16\b.*216"):
        hqqlora.quantize_model(model, CONFIG, progress=False)
    assert all(type(layer) is nn.Linear for layer in model)

    model = nn.Sequential(nn.Linear(K, N), layer_with(INF), nn.Linear(K, N))
    with pytest.raises(ValueError, match=r"^1\b.*\[3, 5\].*inf"):
        hqqlora.quantize_model(model, CONFIG, progress=False)
    assert [type(layer) for layer in model] == [HQQLinear, nn.Linear, nn.Linear]


BAD_ADDITIONS = [
    ({"r": 0}, "r=0"),
    ({"r": 300}, "r=300.*256"),
    ({"lora_alpha": INF}, "lora_alpha=inf"),
    ({"lora_dropout": 2.0}, "lora_dropout=2"),
    ({"target_modules": ["nowhere"]}, "nowhere"),
    ({"target_modules": ["1"]}, "1 is not quantized"),
    ({"target_modules": []}, r"\[\]"),
    ({"target_modules": "("}, r"\("),
    ({"init_lora_weights": "loftq"}, "loftq"),
    ({"rank_pattern": {"0": -1}}, "r=-1"),
    ({"alpha_pattern": {"0": NAN}}, "lora_alpha=nan"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ADDITIONS, ids=str)
def test_a_model_that_can_take_no_adapter_is_not_changed(arguments, message):
    model = nn.Sequential(HQQLinear(nn.Linear(K, N), CONFIG), nn.Linear(N, K))
    with pytest.raises(ValueError, match=message):
        hqqlora.add_lora(model, **arguments)
    assert [type(layer) for layer in model] == [HQQLinear, nn.Linear]
    assert model[1].weight.requires_grad
