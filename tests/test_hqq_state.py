"""An HQQLinear's state_dict is hqq's: hqq reads it, and every form of hqq's is read."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hqq_layers import assert_same_layer, dense_layer, quantized_layer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hqqlora
from hqqlora import BaseQuantizeConfig, HQQLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = [8, 4, 3, 2, 1]
HQQ_KEYS = {
    "W_q",
    "nbits",
    "group_size",
    "shape",
    "scale",
    "zero",
    "axis",
    "packing",
    "unpack_view_dtype",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
}


class TestStateDict:
    @pytest.mark.parametrize("bias", [True, False])
    def test_its_keys_are_hqqs(self, bias: bool) -> None:
        keys = set(quantized_layer(bias=bias).state_dict())
        assert keys == HQQ_KEYS | ({"bias"} if bias else set())

    def test_its_metadata_has_hqqs_dtypes_and_values(self) -> None:
        state = quantized_layer(nbits=3, group_size=32, axis=0).state_dict()
        for key, value in (("nbits", 3), ("group_size", 32), ("axis", 0)):
            assert state[key].dtype == torch.int32
            assert state[key].dim() == 0
            assert state[key].item() == value
        for key in ("view_as_float", "quant_scale", "quant_zero", "offload_meta"):
            assert state[key].dtype == torch.uint8
            assert state[key].dim() == 0
            assert state[key].item() == 0
        for key in ("encoded_state_dict", "stores_quant_config", "channel_wise", "optimize"):
            assert state[key].item() == 1
        assert state["round_zero"].item() == 0
        assert state["shape"].dtype == torch.int64
        assert state["shape"].tolist() == [64, 128]
        for key, text in (
            ("packing", "3bit_32"),
            ("unpack_view_dtype", "torch.int32"),
            ("compute_dtype", "torch.float32"),
        ):
            assert state[key].dtype == torch.uint8
            assert bytes(state[key].tolist()).decode() == text

    def test_each_layer_and_each_call_has_its_own_tensors(self) -> None:
        model = nn.Sequential(quantized_layer(128, 128), quantized_layer(64, 128))
        state = {**model.state_dict(), **nn.ModuleDict({"a": model}).state_dict()}
        metadata = [t for k, t in state.items() if k.rpartition(".")[2] in ("nbits", "shape")]
        assert len({tensor.data_ptr() for tensor in metadata}) == len(metadata) == 8

    def test_safetensors_takes_it_and_gives_it_back(self, tmp_path: Path) -> None:
        model = nn.Sequential(quantized_layer(128, 128, nbits=3), quantized_layer(64, 128))
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        other = nn.Sequential(
            HQQLinear(None, None, initialize=False), HQQLinear(None, None, initialize=False)
        )
        other.load_state_dict(load_file(tmp_path / "model.safetensors"))
        for mine, loaded in zip(model, other, strict=True):
            assert_same_layer(mine, loaded)  # type: ignore[arg-type]

    def test_torch_load_reads_it_with_weights_only(self) -> None:
        layer = quantized_layer()
        for encoded in (True, False):
            layer.encoded_state_dict = encoded
            file = io.BytesIO()
            torch.save(layer.state_dict(), file)
            file.seek(0)
            other = HQQLinear(None, None, initialize=False)
            other.load_state_dict(torch.load(file, weights_only=True))
            assert_same_layer(layer, other)

    @pytest.mark.parametrize("nbits", BITS)
    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("compute_dtype", DTYPES)
    @pytest.mark.parametrize("view_as_float", [False, True])
    def test_an_uninitialized_layer_becomes_what_the_state_says(
        self, nbits: int, axis: int, compute_dtype: torch.dtype, view_as_float: bool
    ) -> None:
        layer = quantized_layer(
            compute_dtype=compute_dtype,
            nbits=nbits,
            axis=axis,
            group_size=32,
            view_as_float=view_as_float,
        )
        state = layer.state_dict()
        assert state["W_q"].is_floating_point() == view_as_float
        other = HQQLinear(None, None, initialize=False)
        keys = other.load_state_dict(state, strict=True)
        assert keys.missing_keys == keys.unexpected_keys == []
        assert_same_layer(layer, other)
        assert not any(p.requires_grad for p in other.parameters())

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize(
        "config",
        [{"nbits": 8}, {"nbits": 3, "axis": 0}, {"group_size": None}, {"nbits": 4}],
    )
    def test_a_layer_of_another_format_takes_that_of_the_state(
        self, config: dict[str, Any], assign: bool
    ) -> None:
        layer = quantized_layer(nbits=2, group_size=16, seed=1)
        other = quantized_layer(**config)
        other.load_state_dict(layer.state_dict(), assign=assign)
        assert_same_layer(layer, other)

    def test_a_layer_of_another_dtype_keeps_it_unless_it_is_assigned_to(self) -> None:
        layer = quantized_layer(compute_dtype=torch.float16, meta_dtype=torch.bfloat16)
        other = quantized_layer(compute_dtype=torch.float32)
        other.load_state_dict(layer.state_dict())
        assert other.compute_dtype == other.scale.dtype == other.bias.dtype == torch.float32
        assert torch.equal(other.scale, layer.scale.float())
        other.load_state_dict(layer.state_dict(), assign=True)
        assert_same_layer(layer, other)

    def test_dtypes_asked_of_an_uninitialized_layer_are_kept(self) -> None:
        state = quantized_layer(compute_dtype=torch.float32).state_dict()
        other = HQQLinear(
            None,
            None,
            compute_dtype=torch.bfloat16,
            meta_dtype=torch.float16,
            initialize=False,
        )
        other.load_state_dict(state)
        assert other.compute_dtype == other.bias.dtype == torch.bfloat16
        assert other.scale.dtype == torch.float16

    def test_a_skeleton_of_the_right_shapes_can_be_loaded(self) -> None:
        layer = quantized_layer()
        skeleton = HQQLinear(
            nn.Linear(128, 64, device="meta"),
            BaseQuantizeConfig(),
            compute_dtype=torch.float32,
            initialize=False,
        )
        assert skeleton.W_q.is_meta
        assert skeleton.W_q.shape == layer.W_q.shape
        skeleton.load_state_dict(layer.state_dict(), assign=True)
        assert_same_layer(layer, skeleton)

    def test_only_the_tensors_are_written_and_read_if_so_wanted(self) -> None:
        layer, other = quantized_layer(seed=1), quantized_layer(seed=2)
        layer.state_dict_metadata = False
        state = layer.state_dict()
        assert set(state) == {"W_q", "scale", "zero", "bias"}
        other.load_state_dict(state, strict=True)
        assert_same_layer(layer, other)

    def test_hqqs_unencoded_form_is_read(self) -> None:
        layer = quantized_layer(nbits=3, axis=0, group_size=32)
        layer.encoded_state_dict = False
        state = layer.state_dict()
        assert state["nbits"] == 3
        assert state["unpack_view_dtype"] is torch.int32
        assert set(state) == (HQQ_KEYS - {"encoded_state_dict"}) | {"bias"}
        other = HQQLinear(None, None, initialize=False)
        other.load_state_dict(state)
        assert_same_layer(layer, other)

    def test_the_nested_form_of_old_checkpoints_is_read(self) -> None:
        layer = quantized_layer()
        meta = layer.meta
        for key in ("unpack_view_dtype", "view_as_float", "channel_wise", "optimize"):
            del meta[key]  # the oldest ones did not have them
        state = {"W_q": layer.W_q, "bias": layer.bias, "meta": meta}
        other = HQQLinear(None, None, initialize=False)
        other.load_state_dict(state)
        assert_same_layer(layer, other)
        model = nn.ModuleDict({"q_proj": HQQLinear(None, None, initialize=False)})
        model.load_state_dict({f"q_proj.{key}": value for key, value in state.items()})
        assert_same_layer(layer, model["q_proj"])  # type: ignore[arg-type]

    def test_scales_and_zeros_that_hqq_quantized_or_stacked_are_read(self) -> None:
        layer = quantized_layer()
        codes = torch.randint(0, 256, layer.zero.shape, dtype=torch.uint8)
        scale, zero = torch.tensor(0.05), torch.tensor(3.0)
        meta = layer.meta
        del meta["zero"]
        meta |= {"quant_zero": True, "zero_q": codes}
        meta["meta_zero"] = {"nbits": 8, "scale": scale, "zero": zero, "view_as_float": False}
        other = HQQLinear(None, None, initialize=False)
        other.load_state_dict({"W_q": layer.W_q, "bias": None, "meta": meta})
        assert torch.equal(other.scale, layer.scale)
        assert torch.equal(other.zero, (codes.float() - zero) * scale)

        meta = layer.meta
        meta["zero_scale"] = torch.stack((meta.pop("zero"), meta.pop("scale")))
        other = HQQLinear(None, None, initialize=False)
        other.load_state_dict({"W_q": layer.W_q, "bias": layer.bias, "meta": meta})
        assert_same_layer(layer, other)

    def test_bits_may_be_stored_as_a_float(self) -> None:
        layer = quantized_layer()
        other = HQQLinear(None, None, initialize=False)
        other.load_state_dict({**layer.state_dict(), "nbits": torch.tensor(4.0)})
        assert_same_layer(layer, other)

    def test_strict_loading_reports_what_is_missing_and_what_is_too_much(self) -> None:
        layer = quantized_layer()
        state = layer.state_dict()
        model = nn.ModuleDict({"fc": quantized_layer(seed=1), "norm": nn.LayerNorm(4)})
        with pytest.raises(RuntimeError, match="Missing key") as error:
            model.load_state_dict({f"fc.{k}": v for k, v in state.items()})
        assert '"norm.weight"' in str(error.value)
        with pytest.raises(RuntimeError, match=r'Unexpected key.*"extra"'):
            layer.load_state_dict({**state, "extra": torch.zeros(1)})
        with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
            layer.load_state_dict({k: v for k, v in state.items() if k != "bias"})
        with pytest.raises(RuntimeError, match=r'Missing key.*"W_q", "scale", "zero"'):
            layer.load_state_dict({"bias": layer.bias})
        with pytest.raises(RuntimeError, match=r'Missing key.*"W_q"'):
            HQQLinear(None, None, initialize=False).load_state_dict({})
        with pytest.raises(RuntimeError, match=r'Unexpected key.*"bias"'):
            quantized_layer(bias=False).load_state_dict(state)

    def test_a_partial_state_may_be_loaded_without_strict(self) -> None:
        layer = quantized_layer()
        before = copy.deepcopy(layer)
        keys = layer.load_state_dict({"other": torch.zeros(1)}, strict=False)
        assert keys.unexpected_keys == ["other"]
        assert_same_layer(layer, before)

    def test_another_shape_is_a_size_mismatch(self) -> None:
        state = quantized_layer(128, 64).state_dict()
        layer = quantized_layer(64, 128)
        before = copy.deepcopy(layer)
        with pytest.raises(RuntimeError, match=r"size mismatch .* \[128, 64\].*\[64, 128\]"):
            layer.load_state_dict(state)
        assert_same_layer(layer, before)


class TestStatesThatCannotBe:
    @staticmethod
    def text(value: str) -> Tensor:
        return torch.tensor(list(value.encode()), dtype=torch.uint8)

    @pytest.mark.parametrize("key", ["unpack_view_dtype", "compute_dtype"])
    @pytest.mark.parametrize("encoded", [True, False])
    def test_nothing_in_a_state_is_evaluated(
        self, key: str, encoded: bool, tmp_path: Path
    ) -> None:
        file = tmp_path / "evaluated"
        attack = f"open({str(file)!r}, 'w') and torch.uint8"
        state = quantized_layer().state_dict()
        state[key] = self.text(attack) if encoded else attack
        with pytest.raises(ValueError, match=rf"fc: {key} .* is not one of torch.float32"):
            nn.ModuleDict({"fc": HQQLinear(None, None, initialize=False)}).load_state_dict(
                {f"fc.{name}": value for name, value in state.items()}
            )
        assert not file.exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"nbits": torch.tensor(5.0)}, "nbits=5.0 is not supported: hqq stores 5"),
            ({"nbits": torch.tensor(6, dtype=torch.int32)}, "nbits=6 is not supported"),
            ({"nbits": torch.tensor(1.58)}, "nbits=1.58.* is not supported"),
            ({"nbits": torch.tensor([4, 4])}, r"a number is stored as a tensor \[2\]"),
            ({"nbits": "four"}, "'four' is not a number"),
            ({"axis": torch.tensor(2)}, "axis=2 must be"),
            ({"group_size": torch.tensor(0)}, "group_size=0 must be positive"),
            ({"group_size": torch.tensor(48)}, "group_size=48 does not divide"),
            ({"group_size": torch.tensor(32)}, r"W_q is torch.uint8 \[64, 64\], but"),
            ({"shape": torch.tensor([64, -128])}, "is not positive"),
            ({"shape": torch.tensor([64, 128, 1])}, "is not .out_features, in_features."),
            ({"shape": torch.tensor([64, 64])}, r"W_q is .*, but a \[64, 64\] weight"),
            ({"channel_wise": torch.tensor(0)}, "channel_wise=False"),
            ({"compute_dtype": torch.int32}, "compute_dtype torch.int32 is not a floating"),
            ({"packing": "8bit_u8"}, "packing '8bit_u8' does not fit nbits=4"),
            ({"unpack_view_dtype": torch.int32}, "unpack_view_dtype .* does not fit nbits=4"),
            ({"unpack_view_dtype": torch.tensor(1.0)}, "a string is stored as torch.float32"),
            ({"W_q": torch.zeros(64, 64, dtype=torch.int32)}, "W_q is torch.int32"),
            ({"W_q": torch.zeros(10, 64, dtype=torch.uint8)}, r"needs torch.uint8 \[64, 64\]"),
            ({"scale": torch.ones(127, 1)}, r"scale is torch.float32 \[127, 1\], but"),
            ({"zero": torch.ones(128, 1, dtype=torch.float64)}, "zero is torch.float64"),
            ({"bias": torch.ones(63)}, r"bias is \[63\], not \[64\]"),
        ],
    )
    def test_they_are_refused_and_the_layer_stays_as_it_was(
        self, change: dict[str, Any], message: str
    ) -> None:
        layer = quantized_layer()
        before = copy.deepcopy(layer)
        with pytest.raises(ValueError, match=message):
            layer.load_state_dict({**quantized_layer(seed=1).state_dict(), **change})
        assert_same_layer(layer, before)

    @pytest.mark.parametrize("key", ["shape", "nbits", "axis"])
    def test_missing_metadata_is_named(self, key: str) -> None:
        state = quantized_layer().state_dict()
        del state[key]
        with pytest.raises(ValueError, match=f"says nothing about '{key}'"):
            HQQLinear(None, None, initialize=False).load_state_dict(state)

    def test_an_uninitialized_layer_needs_metadata(self) -> None:
        layer = quantized_layer()
        layer.state_dict_metadata = False
        with pytest.raises(ValueError, match="neither the checkpoint nor the layer"):
            HQQLinear(None, None, initialize=False).load_state_dict(layer.state_dict())

    def test_a_row_of_words_must_hold_whole_floats_for_view_as_float(self) -> None:
        config = BaseQuantizeConfig(group_size=6, view_as_float=True)
        with pytest.raises(ValueError, match="a packed row of 6 bytes does not hold whole"):
            HQQLinear(dense_layer(6, 12), config, compute_dtype=torch.float32)


# ---- beside hqq --------------------------------------------------------------------------


@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("view_as_float", [False, True])
class TestBesideHqq:
    """hqq's own layer reads ours, and ours reads its, to the last bit of the weight. (Both
    dequantize in float32 here; in 16 bits hqq rounds twice, this library once.)"""

    @pytest.fixture
    def hqq(self) -> Any:
        return pytest.importorskip("hqq.core.quantize")

    def test_hqq_reads_our_state(
        self, hqq: Any, nbits: int, axis: int, view_as_float: bool
    ) -> None:
        ours = quantized_layer(
            nbits=nbits, axis=axis, group_size=32, view_as_float=view_as_float
        )
        theirs = hqq.HQQLinear(
            None, None, compute_dtype=torch.float32, device="cpu", initialize=False
        )
        theirs.load_state_dict(dict(ours.state_dict()))
        assert torch.equal(theirs.dequantize(), ours.dequantize())
        assert torch.equal(theirs.bias, ours.bias)
        assert theirs.meta["shape"] == (64, 128)
        again = HQQLinear(None, None, initialize=False)
        again.load_state_dict(theirs.state_dict())
        assert_same_layer(again, ours)

    def test_we_read_hqqs_state_encoded_or_not(
        self, hqq: Any, nbits: int, axis: int, view_as_float: bool
    ) -> None:
        config = hqq.BaseQuantizeConfig(
            nbits=nbits, group_size=32, axis=axis, view_as_float=view_as_float
        )
        theirs = hqq.HQQLinear(dense_layer(), config, compute_dtype=torch.float32, device="cpu")
        for encoded in (True, False):
            theirs.encoded_state_dict = encoded
            ours = HQQLinear(None, None, initialize=False)
            ours.load_state_dict(theirs.state_dict(), strict=True)
            assert torch.equal(theirs.dequantize(), ours.dequantize())
            assert torch.equal(theirs.bias, ours.bias)
            assert ours.quant_config["weight_quant_params"]["nbits"] == nbits
            assert ours.quant_config["weight_quant_params"]["view_as_float"] == view_as_float

    def test_our_state_has_the_dtypes_and_shapes_of_hqqs(
        self, hqq: Any, nbits: int, axis: int, view_as_float: bool
    ) -> None:
        config = hqqlora.BaseQuantizeConfig(
            nbits=nbits, group_size=32, axis=axis, view_as_float=view_as_float
        )
        theirs = hqq.HQQLinear(dense_layer(), config, compute_dtype=torch.float16, device="cpu")
        ours = HQQLinear(dense_layer(), config, compute_dtype=torch.float16)

        def described(state: dict[str, Tensor]) -> dict[str, Any]:
            return {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in state.items()}

        expected, actual = described(theirs.state_dict()), described(ours.state_dict())
        assert actual == expected
        plain = HQQ_KEYS - {"W_q", "scale", "zero"}
        assert all(torch.equal(ours.state_dict()[k], theirs.state_dict()[k]) for k in plain)
