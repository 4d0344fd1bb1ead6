"""Hostile and damaged state_dicts and files: each is refused with an exception that a caller
can expect (OSError, ValueError or RuntimeError), and what was there before is still there."""

import json
import os
import random
import struct

import pytest
import torch
from torch import nn

import hqqlora
from hqqlora import BaseQuantizeConfig, HQQLinear, LoRALinear

N, K, G = 24, 32, 16
CONFIG = BaseQuantizeConfig(nbits=4, group_size=G)
ELSEWHERE = "/proc/self"  # exists, and nobody can write there


# ---- state_dicts ------------------------------------------------------------------------


def quantized_layer() -> HQQLinear:
    return HQQLinear(nn.Linear(K, N), CONFIG, compute_dtype=torch.float32)


def number(value, dtype=None) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


def text(value: str) -> torch.Tensor:
    return torch.tensor(list(value.encode("utf-8")), dtype=torch.uint8)


ABSENT = object()
W_Q = quantized_layer().state_dict()["W_q"]
# what a state_dict holds instead -> what the message must show
HOSTILE_STATES = [
    ({"W_q": ABSENT}, ["W_q"]),
    ({"scale": ABSENT}, ["scale"]),
    ({"zero": ABSENT}, ["zero"]),
    ({"bias": ABSENT}, ["bias"]),
    ({"nbits": ABSENT}, ["nbits"]),
    ({"shape": ABSENT}, ["shape"]),
    ({"axis": ABSENT}, ["axis"]),
    ({"W_q": W_Q[:-1]}, ["W_q", "[23, 16]", "[24, 16]"]),
    ({"W_q": W_Q.int()}, ["W_q", "int32", "uint8"]),
    ({"W_q": W_Q.to("meta")}, ["W_q"]),
    ({"W_q": W_Q.to_sparse()}, ["W_q"]),
    ({"W_q": W_Q.float()}, ["W_q", "float32"]),
    ({"W_q": number(1.0)}, ["W_q", "[]"]),
    ({"W_q": torch.zeros(24, 3, dtype=torch.bfloat16)}, ["W_q", "bfloat16"]),
    ({"W_q": W_Q.tolist()}, ["W_q"]),
    ({"W_q": None}, ["W_q"]),
    ({"scale": torch.ones(47)}, ["scale", "[47]"]),
    ({"scale": torch.ones(48, dtype=torch.int32)}, ["scale", "int32"]),
    ({"scale": torch.ones(48, dtype=torch.float64)}, ["scale", "float64"]),
    ({"scale": 0.5}, ["scale"]),
    ({"zero": torch.ones(0)}, ["zero", "[0]"]),
    ({"zero": torch.ones(48, 1, device="meta")}, ["zero"]),
    ({"bias": torch.ones(N + 1)}, ["bias", "[25]", "24"]),
    ({"bias": "none"}, ["bias"]),
    ({"nbits": number(5)}, ["5"]),
    ({"nbits": number(-4)}, ["-4"]),
    ({"nbits": number(2)}, ["4bit_u8", "2"]),
    ({"nbits": number(3)}, ["3"]),
    ({"nbits": number([4, 4])}, ["[2]"]),
    ({"nbits": number([])}, ["[0]"]),
    ({"nbits": number(float("nan"))}, ["nan"]),
    ({"nbits": number(4j)}, ["4j"]),
    ({"nbits": torch.ones((), device="meta")}, ["[]"]),
    ({"nbits": "4; import os"}, ["4; import os"]),
    ({"nbits": None}, ["nbits"]),
    ({"group_size": number(0)}, ["0"]),
    ({"group_size": number(-16)}, ["-16"]),
    ({"group_size": number(7)}, ["7", "768"]),
    ({"group_size": number(2**62)}, [str(2**62)]),
    ({"group_size": number(float("inf"))}, ["inf"]),
    ({"group_size": number(1e18)}, ["999999984306749440"]),
    ({"axis": number(2)}, ["2"]),
    ({"axis": number(0)}, ["axis 0"]),
    ({"shape": number([N, K, 1])}, ["[24, 32, 1]"]),
    ({"shape": number([K, N])}, ["24", "32"]),
    ({"shape": number([-N, -K])}, ["-24", "-32"]),
    ({"shape": number([2**40, 2**40])}, [str(2**40)]),
    ({"shape": number([2**62, 4])}, [str(2**62)]),
    ({"shape": number([float("inf"), 32.0])}, ["inf"]),
    ({"shape": number([float("nan"), 32.0])}, ["NaN"]),
    ({"shape": number([N + 0.5, K])}, ["24.5"]),
    ({"shape": number(768)}, ["768"]),
    ({"shape": [N, [K]]}, ["[32]"]),
    ({"packing": text("3bit_32")}, ["3bit_32"]),
    ({"packing": text("ä" * 9)}, ["packing"]),
    ({"packing": number([300, 400])}, ["int64", "[2]"]),
    ({"compute_dtype": text("torch.float64")}, ["torch.float64"]),
    ({"compute_dtype": text("torch.uint8")}, ["torch.uint8"]),
    ({"compute_dtype": text("__import__('os')")}, ["__import__"]),
    ({"unpack_view_dtype": text("torch.int32")}, ["torch.int32"]),
    ({"unpack_view_dtype": number(3)}, ["int64", "[]"]),
    ({"channel_wise": number(0)}, ["channel_wise"]),
    ({"view_as_float": text("yes")}, ["[3]"]),
    ({"encoded_state_dict": number([1, 2])}, ["[2]"]),
]
IDS = [f"{i}-{next(iter(changes))}" for i, (changes, _) in enumerate(HOSTILE_STATES)]


@pytest.mark.parametrize("prefix", ["", "fc."], ids=["layer", "model"])
@pytest.mark.parametrize(("changes", "shows"), HOSTILE_STATES, ids=IDS)
def test_hostile_state_dicts(changes, shows, prefix):
    layer = quantized_layer()
    model = layer if not prefix else nn.ModuleDict({"fc": layer})
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    x = torch.randn(3, K)
    y = layer(x)

    state = {**quantized_layer().state_dict(), **changes}
    state = {prefix + key: value for key, value in state.items() if value is not ABSENT}
    with pytest.raises((ValueError, RuntimeError)) as refusal:
        model.load_state_dict(state)
    message = str(refusal.value)
    assert all(part in message for part in shows), f"{shows} not all in: {message}"
    assert len(message) < 2000

    if "bias" not in changes:  # the bias is an ordinary parameter: load_state_dict reports last
        after = dict(layer.named_parameters())
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert torch.equal(layer(x), y)
    assert (layer.nbits, layer.group_size, layer.axis) == (4, G, 1)


# ---- adapters ---------------------------------------------------------------------------


class Net(nn.Module):
    """Two quantized layers with adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = LoRALinear(quantized_layer(), r=4)
        self.fc2 = LoRALinear(HQQLinear(nn.Linear(N, K), CONFIG), r=4)

    def values(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in hqqlora.lora_parameters(self)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def saved(tmp_path):
    model = Net()
    nn.init.normal_(model.fc1.lora_B)
    hqqlora.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def refuse(folder, kinds=(ValueError, OSError)) -> str:
    """Loading fails; nothing has changed, in the adapter that is there or the dense layers."""
    model = Net()
    before = model.values()
    with pytest.raises(kinds) as refusal:
        hqqlora.load_adapter(model, folder)
    assert same(model.values(), before)
    assert not torch.cuda.is_initialized()
    return str(refusal.value)


def test_the_saved_adapter_is_sound(saved):
    model = Net()
    hqqlora.load_adapter(model, saved)
    assert model.fc1.lora_B.abs().sum() > 0


def test_truncated_weights(saved):
    """A file cut anywhere, as a full disk or an interrupted copy leaves it."""
    path = saved / "adapter_model.safetensors"
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in {0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert "adapter_model.safetensors" in refuse(saved), length


def test_damaged_weights(saved):
    """Bytes of the header changed at random, and lengths that lie: refused, or harmless."""
    path = saved / "adapter_model.safetensors"
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in (2**63, 2**40, len(whole)):
        path.write_bytes(struct.pack("<Q", length) + whole[8:])
        refuse(saved)
    pick = random.Random(3)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(pick.randint(1, 3)):
            damaged[pick.randrange(header)] = pick.randrange(256)
        path.write_bytes(damaged)
        model = Net()
        before = model.values()
        try:
            hqqlora.load_adapter(model, saved)
        except (ValueError, OSError):
            refused += 1
            assert same(model.values(), before)
    assert refused > 150


@pytest.mark.parametrize("length", [0, 1, 40])
def test_truncated_configuration(saved, length):
    path = saved / "adapter_config.json"
    path.write_text(path.read_text()[:length])
    assert "adapter_config.json" in refuse(saved)


def test_configuration_that_is_no_text(saved):
    (saved / "adapter_config.json").write_bytes(b"\xff\xfe\x00{")
    assert "adapter_config.json" in refuse(saved)
    (saved / "adapter_config.json").write_text("[" * 100_000)  # deeper than a parser recurses
    refuse(saved)


HOSTILE_VALUES = [None, True, -1, 0, 2**70, 1e400, float("nan"), "4", [], {}, [[4]], {"a": "b"}]


@pytest.mark.parametrize(
    "key", ["r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "peft_type"]
)
def test_hostile_configuration_values(saved, key):
    """Any JSON value in any place: refused, or it means what the saved one did."""
    path = saved / "adapter_config.json"
    config = json.loads(path.read_text())
    for value in HOSTILE_VALUES:
        path.write_text(json.dumps({**config, key: value}))
        for model in (
            Net(),
            nn.ModuleDict(
                {"fc1": quantized_layer(), "fc2": HQQLinear(nn.Linear(N, K), CONFIG)}
            ),
        ):
            kinds = [type(layer) for layer in model.children()]
            try:
                hqqlora.load_adapter(model, saved)
            except (ValueError, TypeError, OSError):
                assert [type(layer) for layer in model.children()] == kinds
            else:
                assert all(layer.r == 4 for layer in model.children())
    for broken in ("(", "^fc1"):
        path.write_text(json.dumps({**config, "rank_pattern": {broken: broken}}))
        refuse(saved, (ValueError, TypeError))


def test_hostile_names(saved):
    from safetensors.torch import load_file, save_file

    path = saved / "adapter_model.safetensors"
    sound = load_file(path)
    tensor = sound["base_model.model.fc1.lora_A.weight"]
    for name in (
        "fc1.lora_A.weight",
        "base_model.model..lora_A.weight",
        "base_model.model.fc1.base_layer.lora_A.weight",
        "base_model.model.__class__.lora_A.weight",
        "base_model.model.fc1.forward.lora_A.weight",
        "base_model.model.fc1.lora_A.default.weight",
    ):
        save_file({**sound, name: tensor.clone()}, path)
        refuse(saved)


def test_a_pickle_that_runs_code_does_not(saved, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (saved / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.fc1.lora_A.weight": Trap()}, saved / "adapter_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.?only|unsupported|pickle"):
        hqqlora.load_adapter(Net(), saved)
    assert not (tmp_path / "sprung").exists()


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("keep me")
    for folder in (f"{ELSEWHERE}/adapter", tmp_path / "file", tmp_path / "file" / "adapter"):
        with pytest.raises(OSError, match=str(folder).split("/")[-1]):
            hqqlora.save_adapter(Net(), folder)
    assert (tmp_path / "file").read_text() == "keep me"
    assert os.listdir(tmp_path) == ["file"]


def test_a_model_without_adapters_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="LoRALinear"):
        hqqlora.save_adapter(quantized_layer(), tmp_path / "adapter")
    assert os.listdir(tmp_path) == []


# ---- hqqlora train ----------------------------------------------------------------------


def test_training_files(tmp_path, capsys):
    """One line on stderr, exit code 1 or 2, and no folder left behind."""
    from hqqlora.cli import main

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x80\x00" * 100)
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\xff")
    (tmp_path / "other.gguf").write_bytes(b"not a model" * 100)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{")
    (tmp_path / "text.txt").write_text("A line of text.\n" * 2000)
    names = sorted(os.listdir(tmp_path))
    output = ["--output", str(tmp_path / "run")]
    for arguments, shows in [
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--data", "empty.txt"], "empty.txt"),
        (["--data", "bytes.txt"], "bytes.txt"),
        (["--data", "broken.jsonl"], "broken.jsonl"),
        (["--data", "model"], "model"),
        (["--data", "text.txt", "--model", "nowhere"], "nowhere"),
        (["--data", "text.txt", "--model", "model"], "model"),
        (["--data", "text.txt", "--model", "cut.gguf"], "cut.gguf"),
        (["--data", "text.txt", "--model", "other.gguf"], "other.gguf"),
        (["--bits", "5"], "5"),
        (["--group-size", "-1"], "-1"),
        (["--rank", "0"], "0"),
        (["--steps", "many"], "many"),
        (["--dropout", "1"], "1"),
        (["--learning-rate", "nan"], "nan"),
        (["--resume"], "run"),
    ]:
        located = [
            str(tmp_path / a) if a in (*names, "nowhere", "nowhere.txt") else a
            for a in arguments
        ]
        code = main(["train", *located, *output])
        captured = capsys.readouterr()
        assert code in (1, 2), (arguments, captured)
        assert shows in captured.err, (arguments, captured.err)
        assert captured.err.count("\n") == 1, captured.err
        assert "Traceback" not in captured.err
        assert sorted(os.listdir(tmp_path)) == names, arguments
