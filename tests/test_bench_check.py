"""What benchmarks/check.py takes for the same result, and what it does not."""

from collections.abc import Callable

import benchmarks_on_path  # noqa: F401
import pytest
import torch
from check import Exact, Line, drawn, errors, lines, read_back
from layers import Layers


@pytest.fixture(scope="module")
def layers() -> Layers:
    torch.manual_seed(0)
    return Layers(64, 128, torch.float32, 4, 64, 1, copies=1, same_numbers=True)


def test_the_contenders_of_a_benchmark_compute_the_same(layers: Layers, monkeypatch):
    monkeypatch.setattr("check.N", 64)
    monkeypatch.setattr("check.K", 128)
    monkeypatch.setattr("check.ROWS", (3,))
    found = {line.name: errors(line, torch.float32) for line in lines(layers)}
    assert found.keys() == {
        *("forward, M = 3", "dgrad, M = 3", "forward + backward, M = 3"),
        *("dequantize", "LoRA, M = 3"),
    }
    for of in found.values():
        assert {"hqqlora", "hqq"} < of.keys()
        assert max(of.values()) < 1


def wrong_by_one_code(layers: Layers) -> torch.Tensor:
    W = read_back(layers.hqq[0]).value.float()
    W[5, 7] += layers.ours[0].scale.reshape(-1)[5 * 128 // 64]
    return W


@pytest.mark.parametrize(
    "spoil",
    [
        wrong_by_one_code,
        lambda layers: layers.dense[0] * 1.001,
        lambda layers: layers.dense[0].masked_fill(torch.eye(64, 128) > 0, float("nan")),
    ],
)
def test_another_result_is_seen(layers: Layers, spoil: Callable[[Layers], torch.Tensor]):
    W, spoilt = read_back(layers.hqq[0]), spoil(layers)
    (x,) = drawn(3, torch.float32, 128)
    line = Line("", {"wrong": lambda i: x.value.float() @ spoilt.T}, (x @ W.T,), 128)
    assert errors(line, torch.float32)["wrong"] > 1


def test_more_results_than_expected_are_not_passed_over(layers: Layers):
    x = Exact.of(torch.ones(2, 2))
    line = Line("", {"two": lambda i: (x.value, x.value)}, (x,), 0)
    with pytest.raises(ValueError, match="zip"):
        errors(line, torch.float32)
