"""BaseQuantizeConfig gives hqq's dict, and what cannot be done is refused by name."""

import pytest

import hqqlora
from hqqlora.config import QuantSettings

HQQ_4_BITS = {
    "weight_quant_params": {
        "nbits": 4,
        "channel_wise": True,
        "group_size": 64,
        "optimize": True,
        "round_zero": True,
        "axis": 1,
        "view_as_float": False,
    },
    "scale_quant_params": None,
    "zero_quant_params": None,
    "offload_meta": False,
}


def test_the_default_is_hqqs_dict() -> None:
    assert hqqlora.BaseQuantizeConfig() == HQQ_4_BITS


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("group_size", [64, 8, None])
@pytest.mark.parametrize("view_as_float", [False, True])
def test_every_option_gives_the_dict_that_hqq_gives(
    nbits: int, axis: int, group_size: int | None, view_as_float: bool
) -> None:
    hqq = pytest.importorskip("hqq.core.quantize")
    options = {"axis": axis, "view_as_float": view_as_float}
    ours = hqqlora.BaseQuantizeConfig(nbits, group_size, **options)
    assert ours == hqq.BaseQuantizeConfig(nbits, group_size, **options)


def test_a_solver_is_named_only_if_it_is_not_the_default() -> None:
    assert "solver" not in hqqlora.BaseQuantizeConfig(solver="default")
    assert hqqlora.BaseQuantizeConfig(solver="reference")["solver"] == "reference"
    assert hqqlora.BaseQuantizeConfig(solver="minmax")["solver"] == "minmax"


def test_optimize_false_means_the_minmax_solver() -> None:
    config = hqqlora.BaseQuantizeConfig(optimize=False, solver="reference")
    assert QuantSettings.parse(config).effective_solver == "minmax"
    config = hqqlora.BaseQuantizeConfig(optimize=True, solver="reference")
    assert QuantSettings.parse(config).effective_solver == "reference"


def test_round_zero_follows_hqqs_rule_unless_given() -> None:
    def round_zero(**options: object) -> object:
        config = hqqlora.BaseQuantizeConfig(**options)  # type: ignore[arg-type]
        return config["weight_quant_params"]["round_zero"]

    assert [round_zero(nbits=n) for n in (8, 4, 3, 2, 1)] == [False, True, False, False, False]
    assert round_zero(nbits=4, round_zero=False) is False
    assert round_zero(nbits=2, round_zero=True) is True


def test_whole_floats_are_integers() -> None:
    config = hqqlora.BaseQuantizeConfig(nbits=4.0, group_size=64.0, axis=1.0)  # type: ignore[arg-type]
    assert config == HQQ_4_BITS
    assert type(config["weight_quant_params"]["nbits"]) is int


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nbits": 5}, "5 is not supported.*whole bytes"),
        ({"nbits": 6.0}, "6.0 is not supported.*whole bytes"),
        ({"nbits": 1.58}, "1.58 is not supported.*nbits=2"),
        ({"nbits": 7}, "nbits=7 is not supported; supported are 8, 4, 3, 2, 1"),
        ({"nbits": 0}, "nbits=0 "),
        ({"nbits": -4}, "nbits=-4 "),
        ({"group_size": 0}, "group_size=0 must be positive"),
        ({"group_size": -64}, "group_size=-64 must be positive"),
        ({"axis": 2}, "axis=2 must be 1 .* or 0"),
        ({"axis": -1}, "axis=-1 must be"),
        ({"solver": "awq"}, "solver='awq' is not one of default, reference, minmax"),
        ({"quant_zero": True}, "quant_zero=True is not supported: zeros keep 16 or 32 bits"),
        ({"quant_scale": True}, "quant_scale=True is not supported: scales keep 16"),
        ({"offload_meta": True}, "offload_meta=True is not supported: scale and zero stay"),
    ],
)
def test_unsupported_values_are_refused_with_the_value_and_the_reason(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        hqqlora.BaseQuantizeConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nbits": "4"}, "nbits must be an integer, not '4'"),
        ({"nbits": True}, "nbits must be an integer, not True"),
        ({"nbits": 4.5}, "nbits must be an integer, not 4.5"),
        ({"group_size": 63.5}, "group_size must be an integer"),
        ({"group_size": float("inf")}, "group_size must be an integer"),
        ({"axis": None}, "axis must be an integer"),
        ({"view_as_float": 1}, "view_as_float must be True or False, not 1"),
        ({"optimize": "yes"}, "optimize must be True or False"),
        ({"round_zero": 1.0}, "round_zero must be True or False"),
    ],
)
def test_values_of_the_wrong_type_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        hqqlora.BaseQuantizeConfig(**options)  # type: ignore[arg-type]


class TestParse:
    def test_it_reads_what_base_quantize_config_gives(self) -> None:
        for options in (
            {},
            {"nbits": 3, "group_size": None, "axis": 0, "solver": "minmax"},
            {"nbits": 4, "optimize": False, "round_zero": False, "view_as_float": True},
        ):
            config = hqqlora.BaseQuantizeConfig(**options)  # type: ignore[arg-type]
            assert QuantSettings.parse(config).to_config() == config

    def test_it_reads_the_flat_form_of_older_checkpoints(self) -> None:
        flat = {
            "nbits": 4,
            "group_size": 64,
            "quant_zero": False,
            "quant_scale": False,
            "offload_meta": False,
            "view_as_float": False,
            "axis": 1,
        }
        assert QuantSettings.parse(flat).to_config() == HQQ_4_BITS

    def test_it_leaves_its_argument_alone(self) -> None:
        config = hqqlora.BaseQuantizeConfig()
        QuantSettings.parse(config)
        assert config == HQQ_4_BITS

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"zero_quant_params": {"nbits": 8}}, "quant_zero=True is not supported"),
            ({"scale_quant_params": {"nbits": 8}}, "quant_scale=True is not supported"),
            ({"offload_meta": True}, "offload_meta=True is not supported"),
            ({"weight_quant_params": {"bits": 4}}, r"unknown keys \['bits'\]"),
            ({"weight_quant_params": {"channel_wise": False}}, "channel_wise=False"),
            ({"weight_quant_params": None}, "weight_quant_params must be a dict"),
            ({"extra": 1}, r"unknown keys \['extra'\]"),
        ],
    )
    def test_it_refuses_what_it_does_not_know(
        self, change: dict[str, object], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            QuantSettings.parse({**hqqlora.BaseQuantizeConfig(), **change})

    def test_it_refuses_what_is_not_a_dict(self) -> None:
        with pytest.raises(TypeError, match="quant_config must be a dict"):
            QuantSettings.parse("4bit")  # type: ignore[arg-type]


class TestGroupSizeFor:
    def test_none_is_a_row_or_a_column(self) -> None:
        rows = QuantSettings.parse(hqqlora.BaseQuantizeConfig(group_size=None, axis=1))
        columns = QuantSettings.parse(hqqlora.BaseQuantizeConfig(group_size=None, axis=0))
        assert rows.group_size_for(48, 80) == 80
        assert columns.group_size_for(48, 80) == 48

    def test_it_need_only_divide_the_number_of_elements(self) -> None:
        settings = QuantSettings.parse(hqqlora.BaseQuantizeConfig(group_size=64))
        assert settings.group_size_for(32, 10) == 64

    def test_otherwise_the_message_has_layer_shape_and_group_size(self) -> None:
        settings = QuantSettings.parse(hqqlora.BaseQuantizeConfig(group_size=64))
        with pytest.raises(ValueError, match=r"q_proj: group_size=64 .* weight \[3, 10\]"):
            settings.group_size_for(3, 10, "q_proj")

    def test_an_empty_weight_is_refused(self) -> None:
        settings = QuantSettings.parse(hqqlora.BaseQuantizeConfig())
        with pytest.raises(ValueError, match=r"head: an empty weight \[0, 64\]"):
            settings.group_size_for(0, 64, "head")
