"""The chunked loss against the model's own, the learning rate, and the perplexity."""

from __future__ import annotations

import math

import pytest
import torch

from hqqlora import head_cross_entropy
from hqqlora.training.batches import Examples
from hqqlora.training.loop import learning_rate
from hqqlora.training.next_token_loss import NextTokenLoss
from hqqlora.training.options import TrainOptions
from hqqlora.training.perplexity import measure_perplexity

transformers = pytest.importorskip("transformers")


def tiny(kind, dtype=torch.float32, **extra):
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        **extra,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)


MODELS = {
    "Llama": (True, {}),
    "Llama tied": (True, {"tie_word_embeddings": True}),
    "Granite": (False, {"logits_scaling": 3.0}),  # divides its logits
    "Gemma2": (False, {"final_logit_softcapping": 2.0, "head_dim": 8}),  # bends them
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_models_own(name, monkeypatch):
    chunked, extra = MODELS[name]
    monkeypatch.setattr(head_cross_entropy, "_CHUNK", 7)  # 3 x 19 predictions: 8 of 7, one of 1
    model = tiny(name.split()[0], **extra)
    ids = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(2))
    loss = NextTokenLoss(model)
    assert loss.chunked is chunked

    expected = model(input_ids=ids, labels=ids).loss
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    assert loss.backward(ids) == pytest.approx(expected.item(), rel=1e-5)
    for parameter_name, parameter in model.named_parameters():
        scale = gradients[parameter_name].abs().max().item()
        torch.testing.assert_close(
            parameter.grad, gradients[parameter_name], rtol=1e-3, atol=1e-5 * scale + 1e-9
        )
    assert loss.sum(ids) == pytest.approx(57 * expected.item(), rel=1e-5)


def test_nothing_trainable_gives_no_gradient():
    model = tiny("Llama").requires_grad_(False)
    ids = torch.arange(20)[None]
    loss = NextTokenLoss(model)
    total = loss.sum(ids)
    assert total == pytest.approx(19 * model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_parts_of_a_batch_add_up_to_it():
    rows = [([5, 6, 7, 8], [-100, 6, 7, 8]), ([9, 10], [9, 10]), ([3, 4, 5], [-100, -100, 5])]
    examples = Examples(rows)
    model = tiny("Llama")
    loss = NextTokenLoss(model)
    whole = loss.backward(*examples.batch(0, 3, seed=1))
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    parts = examples.parts(0, 3, 1, 2)
    assert [len(part.ids) for part in parts] == [2, 1]
    assert sum(loss.backward(*p, predictions=5) for p in parts) == pytest.approx(whole)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_perplexity_is_that_of_all_predictions_together():
    model = tiny("Llama").eval()
    windows = torch.randint(97, (5, 11), generator=torch.Generator().manual_seed(3))
    model.train()
    found = measure_perplexity(model, NextTokenLoss(model), Examples(windows), 2, "test")
    with torch.no_grad():
        logits = model.eval()(input_ids=windows).logits.double()
    chosen = logits[:, :-1].log_softmax(-1).gather(2, windows[:, 1:, None])
    assert found.tokens == 50
    assert found.loss == pytest.approx(-chosen.mean().item(), rel=1e-5)
    assert found.value == pytest.approx(math.exp(-chosen.mean().item()), rel=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("steps", "warmup"), [(60, 6), (10, 0), (1, 0), (1, 5), (4, 4), (3, 9)]
)
def test_learning_rate_rises_then_falls(schedule, steps, warmup):
    options = TrainOptions(steps=steps, warmup=warmup, schedule=schedule, learning_rate=0.5)
    rates = [learning_rate(step, options) for step in range(steps)]
    top = min(warmup, steps)
    assert max(rates) == pytest.approx(0.5)
    assert all(0 < rate <= 0.5 for rate in rates)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert learning_rate(steps, options) == pytest.approx(0) or top == steps
