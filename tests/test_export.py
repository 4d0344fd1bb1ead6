"""torch.export of the inference forward: any length, and a file in between."""

import io

import pytest
import torch
from compiled_models import Block, adapted_llama, ours_in
from peft_models import token_ids
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


def check_export(model, example, other, strict, products):
    model = model.eval()
    length = torch.export.Dim("length", min=2, max=48)
    with torch.no_grad():
        program = torch.export.export(
            model, (example,), dynamic_shapes=({1: length},), strict=strict
        )
        assert ours_in(program.graph_module) == {"hqqlora::lora_linear": products}
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for x in (example, other):
            expected = model(x)
            torch.testing.assert_close(program.module()(x), expected)
            assert torch.equal(loaded(x), program.module()(x))


@pytest.mark.parametrize("strict", [False, True])
def test_a_block(strict):
    check_export(Block(0.3), torch.randn(2, 7, 64), torch.randn(2, 11, 64), strict, 2)


@pytest.mark.parametrize(("kind", "strict"), [("own", True), ("peft", False)])
def test_a_llama(kind, strict):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    model = Logits(adapted_llama(kind))
    check_export(model, token_ids(length=7), token_ids(length=11), strict, 7)
