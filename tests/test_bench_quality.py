"""`hqqlora bench quality` and `hqqlora bench quantize`, on small matrices and a tiny model."""

import torch

from hqqlora.bench import quality, quantize
from hqqlora.cli import main


def test_each_solver_is_what_its_name_says():
    weight, importance = torch.randn(32, 128) * 0.02, torch.rand(128)
    read = {
        name: quality.requantizer(quality.Case(4, 64, "fp16", name))(weight, importance)
        for name in quality.QUANTIZERS
    }
    for name, value in read.items():
        assert 0 < (value - weight).norm() < 0.15 * weight.norm(), name
    assert len({value.numpy().tobytes() for value in read.values()}) == len(read)


def test_the_table_has_both_storage_types_and_hqq_without_rounded_zeros_at_4_bits_alone():
    rows = list(quality.cases(None, None))
    assert {(c.nbits, c.group_size) for c in rows} == {(4, 64), (3, 64), (2, 64), (2, 16)}
    assert {c.meta for c in rows} == {"fp16", "bf16"}
    assert {c.nbits for c in rows if c.name == "hqq, float zero"} == {4}


def test_extrapolation_multiplies_the_matrices_of_a_layer_out(monkeypatch, capsys):
    monkeypatch.setattr(quantize, "LLAMA_70B", (quantize.Shape(10, 10, 2),))
    monkeypatch.setattr(quantize, "seconds_of", lambda *_: 0.5)
    assert main(["bench", "quantize", "--extrapolate", "12000"]) == 0
    assert ": 60 s, 1.0 minutes" in capsys.readouterr().out


def test_a_group_size_that_does_not_divide_the_rows_is_refused(capsys):
    assert main(["bench", "quantize", "--group-size", "60"]) == 2
    assert "60 does not divide" in capsys.readouterr().err
