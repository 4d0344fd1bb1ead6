"""The GPU benchmark without a GPU: its figures are pure functions, and its whole flow runs on
the CPU with tiny shapes."""

import json

import benchmarks_on_path  # noqa: F401
import gpu_bench
import pytest
import timing
import torch
from gpu import figures, stamp


def times(**seconds):
    count = len(next(iter(seconds.values())))
    return timing.Times([{name: s[i] for name, s in seconds.items()} for i in range(count)])


def row(op="linear", M=16, **medians):
    seconds = {name: {"q20": s * 0.9, "q50": s, "q80": s * 1.2} for name, s in medians.items()}
    return {
        "op": op,
        "N": 4096,
        "K": 14336,
        "M": M,
        "seconds": seconds,
        "ratio": {n: s / medians["hqqlora"] for n, s in medians.items() if n != "hqqlora"},
        "tflops": 1.5,
        "gbytes": 2000.0,
        "host_seconds": 8e-6,
        "predicted": 14e-6,
    }


def test_medians_and_quantiles_ignore_a_hiccup():
    measured = times(hqqlora=[3.0, 1.0, 2.0, 1.5, 900.0])
    assert measured.median("hqqlora") == 2.0
    assert measured.summary()["hqqlora"] == {"q20": 1.5, "q50": 2.0, "q80": 3.0, "rounds": 5}


def test_a_ratio_is_that_of_the_same_round():
    """Both were slowed threefold in the second round: the ratio does not notice."""
    measured = times(hqqlora=[1.0, 3.0, 1.0], dense=[2.0, 6.0, 2.0])
    assert measured.ratio("dense", "hqqlora") == 2.0


def test_operations_and_bytes_of_a_product():
    M, N, K = 16, 4096, 14336
    assert figures.flops("linear", M, N, K) == 2 * M * N * K
    assert figures.flops("dequantize", M, N, K) == 0
    # 4 bits and two 16-bit numbers for each 64: 4.5 bits a weight
    assert figures.packed_bytes(N, K, 4, 64) == N * K * 4.5 / 8
    moved = figures.least_bytes("linear", M, N, K, 4, 64)
    assert moved == N * K * 4.5 / 8 + 2 * M * (N + K)


@pytest.mark.parametrize("op", gpu_bench.OPS)
def test_bytes_are_known_of_every_op_and_grow_with_the_weight(op):
    small, large = (figures.least_bytes(op, 8, N, 256, 4, 64) for N in (128, 4096))
    assert 0 < small < large


def test_predictions_are_found_by_the_devices_own_name():
    known = [
        {"device": "H100", "operation": "linear", "axis": axis, "N": 8, "K": 64, "M": 1}
        | {"seconds": seconds}
        for axis, seconds in ((0, 1e-6), (1, 2e-6))
    ]
    assert figures.predicted(known, "NVIDIA H100 80GB HBM3", "linear", 8, 64, 1) == 2e-6
    assert figures.predicted(known, "NVIDIA H100 80GB HBM3", "linear", 8, 64, 2) is None
    assert figures.predicted(known, "NVIDIA L4", "linear", 8, 64, 1) is None
    assert figures.predicted([], "NVIDIA H100 80GB HBM3", "linear", 8, 64, 1) is None


def test_the_table_says_who_was_faster_and_by_how_much():
    text = figures.table_of("linear", [row(hqqlora=15e-6, dense=45e-6), row(hqqlora=20e-6)])
    header, _, first, second = (line for line in text.splitlines() if line.startswith("|"))
    cells = dict(zip(header.split("|"), first.split("|"), strict=True))
    found = {name.strip(): cell.strip() for name, cell in cells.items()}
    assert found["hqqlora us"] == "15"
    assert found["20 .. 80 %"] == "13.5 .. 18"
    assert found["predicted us"] == "14"
    assert found["dense us"] == "45"
    assert found["vs dense"] == "3.00x"
    assert "x |" not in second.split("|", 3)[3]  # no rival, no ratio


def test_the_document_names_what_failed_and_what_there_was_no_time_for():
    text = figures.document(
        "H100", 4, [row(hqqlora=1e-6)], ["linear 8x64 M=1"], ["linear 8x64: hqq: OOM"]
    )
    assert "linear 8x64: hqq: OOM" in text
    assert "Left out" in text
    assert "4 bits" in text


def test_cases_keep_a_weight_for_all_its_ops():
    listed = list(gpu_bench.cases(("linear", "quantize"), [(8, 64), (16, 64)], (1, 4)))
    names = [str(case) for case in listed[:3]]
    assert names == ["linear 8x64 M=1", "linear 8x64 M=4", "quantize 8x64"]
    assert [c.N for c in listed] == [8] * 3 + [16] * 3


def test_a_rival_that_cannot_run_is_named_and_left_out():
    bench = gpu_bench.Bench(gpu_bench.HostClock(), "cpu", "x", torch.bfloat16, [], 0.0)

    def broken(i):
        raise ValueError("no kernel image\nmore")

    found = bench.working(gpu_bench.Case("linear", 8, 64, 1), {"a": broken, "b": lambda i: i})
    assert list(found) == ["b"]
    assert bench.failed == ["linear 8x64 M=1: a: ValueError: no kernel image"]


def test_the_stamp_names_what_was_measured():
    facts = stamp.describe("cpu")
    words = stamp.in_words(facts)
    assert facts["torch"] in words
    assert facts["commit"] in words


def test_dry_run_of_everything(tmp_path, capsys):
    status = gpu_bench.main(["--dry-run", "--rows", "2", "--out", str(tmp_path)])
    assert status == 0
    written = json.loads((tmp_path / "gpu_bench.json").read_text())
    assert {row["op"] for row in written["rows"]} == set(gpu_bench.OPS)
    assert not written["failed"]
    for measured in written["rows"]:
        assert {"hqqlora", "dense"} <= set(measured["seconds"]) or measured["op"] == "quantize"
        assert all(s["q50"] > 0 and s["rounds"] >= 3 for s in measured["seconds"].values())
    text = (tmp_path / "gpu_bench.md").read_text()
    assert "say nothing about a GPU" in text
    assert text in capsys.readouterr().out


def test_out_of_time_is_said(tmp_path):
    status = gpu_bench.main(["--dry-run", "--limit", "-1", "--out", str(tmp_path)])
    assert status == 1
    written = json.loads((tmp_path / "gpu_bench.json").read_text())
    assert "linear 64x128 M=1" in written["left_out"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_refused_with_the_reason():
    with pytest.raises(SystemExit, match=r"no CUDA device .*torch"):
        gpu_bench.main([])
