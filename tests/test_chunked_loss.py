"""`chunk_loss`: loss and gradients of the model's own forward, and where that still runs."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from tiny_training import LENGTH, STEPS, adapted, losses, quantized, trainer
from torch import nn

import hqqlora
from hqqlora import head_cross_entropy

transformers = pytest.importorskip("transformers")

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(head_cross_entropy, "_CHUNK", 7)


def tiny_model(kind="Llama", dtype=torch.float32, **extra):
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **extra)
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).train()


def tokens(rows=3, length=20):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))


def some_labels(ids):
    labels = ids.clone()
    labels[:, :5] = -100
    labels[1, 9:] = -100
    return labels


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    found = model(**inputs)
    found.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found, gradients


# ---- the same loss -----------------------------------------------------------------------

IDS = tokens()
MASK = torch.ones_like(IDS)
MASK[0, 15:] = 0
INPUTS = {
    "labels": {"labels": IDS},
    "some labels": {"labels": some_labels(IDS)},
    "padding": {"labels": some_labels(IDS), "attention_mask": MASK},
    "a larger batch": {"labels": IDS, "num_items_in_batch": torch.tensor(200)},
    "a larger batch, int": {"labels": IDS, "num_items_in_batch": 200},
    "shifted labels": {"labels": IDS, "shift_labels": some_labels(IDS).roll(-1, 1)},
    "embeddings": {"labels": IDS},
}


@pytest.mark.parametrize("case", INPUTS)
def test_loss_and_gradients_are_the_models_own(case):
    model = tiny_model()
    inputs = {"input_ids": IDS, **INPUTS[case]}
    if case == "embeddings":
        del inputs["input_ids"]
        inputs["inputs_embeds"] = torch.randn(3, 20, 32)
    own, wanted = loss_and_gradients(model, **inputs)
    assert hqqlora.chunk_loss(model) is model
    chunked, found = loss_and_gradients(model, **inputs)
    assert own.logits is not None
    assert chunked.logits is None
    assert chunked.loss.item() == pytest.approx(own.loss.item(), rel=1e-6)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        scale = wanted[name].abs().max()
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=2e-5 * scale)


@pytest.mark.parametrize(
    ("kind", "dtype", "extra"),
    [
        ("Llama", torch.bfloat16, {}),
        ("Llama", torch.float32, {"tie_word_embeddings": True}),
        ("Qwen3", torch.float32, {"head_dim": 8}),
        ("Mixtral", torch.float32, {"num_local_experts": 4}),
    ],
    ids=["bf16", "tied", "Qwen3", "Mixtral"],
)
def test_of_other_models(kind, dtype, extra):
    model = tiny_model(kind, dtype, **extra)
    own, wanted = loss_and_gradients(model, input_ids=IDS, labels=IDS)
    chunked, found = loss_and_gradients(hqqlora.chunk_loss(model), input_ids=IDS, labels=IDS)
    bound = 2**-5 if dtype == torch.bfloat16 else 1e-4
    assert chunked.loss.item() == pytest.approx(own.loss.item(), rel=bound)
    for name, gradient in found.items():
        difference = (gradient - wanted[name]).norm()
        assert difference <= bound * wanted[name].norm() + 1e-9, name


def test_labels_none_of_which_is_learned_give_nan_as_the_models_own():
    model = tiny_model()
    labels = torch.full_like(IDS, -100)
    assert model(input_ids=IDS, labels=labels).loss.isnan()
    assert hqqlora.chunk_loss(model)(input_ids=IDS, labels=labels).loss.isnan()


def test_hidden_states_are_there_for_who_asks():
    model = hqqlora.chunk_loss(tiny_model())
    found = model(input_ids=IDS, labels=IDS, output_hidden_states=True)
    assert [tuple(h.shape) for h in found.hidden_states] == [(3, 20, 32)] * 3


# ---- where the model's own forward runs --------------------------------------------------

OWN = {
    "no labels": {},
    "some logits": {"labels": IDS, "logits_to_keep": 20},
    "router": {"labels": IDS, "output_router_logits": True},
}


@pytest.mark.parametrize("case", OWN)
def test_what_it_does_not_serve_is_the_models_own(case):
    model = tiny_model("Mixtral", num_local_experts=4)
    own = model(input_ids=IDS, **OWN[case])
    found = hqqlora.chunk_loss(model)(input_ids=IDS, **OWN[case])
    assert torch.equal(found.logits, own.logits)
    assert (found.loss is None) is (own.loss is None)
    assert own.loss is None or torch.equal(found.loss, own.loss)


def test_a_routers_loss_is_not_lost_where_the_configuration_asks_for_it():
    model = tiny_model("Mixtral", num_local_experts=4, output_router_logits=True)
    own = model(input_ids=IDS, labels=IDS)
    found = hqqlora.chunk_loss(model)(input_ids=IDS, labels=IDS)
    assert found.aux_loss is not None
    assert torch.equal(found.loss, own.loss)


def test_evaluation_has_logits():
    model = hqqlora.chunk_loss(tiny_model())
    assert model.eval()(input_ids=IDS, labels=IDS).logits.shape == (3, 20, VOCABULARY)
    with torch.no_grad():
        assert model.train()(input_ids=IDS, labels=IDS).logits is not None


def test_a_tuple_stays_one():
    model = hqqlora.chunk_loss(tiny_model())
    found = model(input_ids=IDS, labels=IDS, return_dict=False)
    assert [tuple(part.shape) for part in found[:2]] == [(), (3, 20, VOCABULARY)]


def test_arguments_may_be_positional():
    model = hqqlora.chunk_loss(tiny_model())
    found = model(IDS, MASK, labels=IDS)
    assert found.logits is None
    assert torch.equal(found.loss, model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss)
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model(IDS, input_ids=IDS)


def test_compiled_it_is_the_models_own_in_one_graph():
    model = tiny_model()
    own = model(input_ids=IDS, labels=IDS).loss
    found = torch.compile(hqqlora.chunk_loss(model), backend="eager", fullgraph=True)(
        input_ids=IDS, labels=IDS
    )
    assert found.logits is not None
    torch.testing.assert_close(found.loss, own)


# ---- who is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("Granite", {"logits_scaling": 3.0}),
        ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}),
    ],
)
def test_a_model_that_does_more_with_its_logits_is_refused(kind, extra):
    model = tiny_model(kind, **extra)
    with pytest.raises(ValueError, match=f"{kind}ForCausalLM: its loss is not the cross"):
        hqqlora.chunk_loss(model)
    assert "forward" not in vars(model)
    assert model.training


def test_a_model_with_a_loss_of_its_own_is_refused():
    model = tiny_model()
    model.loss_function = lambda logits, labels, **_: logits.float().square().mean()
    with pytest.raises(ValueError, match="cannot be computed in chunks"):
        hqqlora.chunk_loss(model)


@pytest.mark.parametrize("kind", ["encoder and decoder", "no language model", "backbone"])
def test_other_modules_are_refused(kind):
    small = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1}
    model = {
        "encoder and decoder": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(num_heads=2, **small)
        ),
        "no language model": lambda: nn.Linear(4, 4),
        "backbone": lambda: tiny_model().model,
    }[kind]()
    with pytest.raises(ValueError, match=f"{type(model).__name__}: its loss is not"):
        hqqlora.chunk_loss(model)


# ---- a model stays what it is ------------------------------------------------------------


def test_undone_nothing_is_left():
    model = tiny_model()
    assert hqqlora.unchunk_loss(model) is model  # it was not chunked
    hqqlora.chunk_loss(hqqlora.chunk_loss(model))
    hqqlora.unchunk_loss(model)
    assert "forward" not in vars(model)
    assert model(input_ids=IDS, labels=IDS).logits is not None


def test_a_forward_that_stood_in_the_place_comes_back():
    """As accelerate's hooks stand there, which move tensors to a layer's device."""
    model = tiny_model()
    calls = []

    def hooked(*args, **kwargs):
        calls.append(kwargs.keys())
        return type(model).forward(model, *args, **kwargs)

    model.forward = hooked
    hqqlora.chunk_loss(model)
    calls.clear()
    assert model(input_ids=IDS, labels=IDS).logits is None
    assert calls == []
    model(input_ids=IDS)
    assert len(calls) == 1
    assert hqqlora.unchunk_loss(model).forward is hooked


def test_names_arguments_and_state_are_the_models_own():
    model = tiny_model()
    names, arguments = list(model.state_dict()), inspect.signature(model.forward)
    hqqlora.chunk_loss(model)
    assert list(model.state_dict()) == names
    assert inspect.signature(model.forward) == arguments


def test_a_copy_calls_its_own_weights():
    model = hqqlora.chunk_loss(tiny_model())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    zero = model(input_ids=IDS, labels=IDS).loss.item()
    assert zero == pytest.approx(torch.tensor(float(VOCABULARY)).log().item())
    found = other(input_ids=IDS, labels=IDS)
    assert found.logits is None
    assert found.loss.item() > 1.01 * zero
    assert other(input_ids=IDS).logits.abs().max() > 0


def test_a_pickled_model_comes_back_unchunked():
    model = hqqlora.chunk_loss(tiny_model())
    again = pickle.loads(pickle.dumps(model))
    assert again(input_ids=IDS, labels=IDS).logits is not None


# ---- with PEFT and Trainer ---------------------------------------------------------------


def test_trainer_learns_the_same(tiny, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    found = []
    for chunked in (False, True):
        model = adapted(quantized(tiny))
        if chunked:
            assert hqqlora.chunk_loss(model) is model
        made = trainer(
            model, tiny, tmp_path, gradient_accumulation_steps=2, gradient_checkpointing=True
        )
        made.train()
        found.append(losses(made))
        assert made.evaluate()["eval_loss"] < 5
    assert len(found[0]) == STEPS
    assert found[1] == pytest.approx(found[0], rel=2e-5)


def test_own_adapters_learn_the_same(tiny):
    ids = torch.arange(LENGTH).remainder(50)[None]
    found = []
    for chunked in (False, True):
        torch.manual_seed(0)
        model = hqqlora.add_lora(quantized(tiny), r=4, lora_alpha=8).train()
        if chunked:
            hqqlora.chunk_loss(model)
        optimizer = torch.optim.AdamW(hqqlora.lora_parameters(model), lr=1e-2)
        steps = []
        for _ in range(4):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(loss.item())
        found.append(steps)
    assert found[0][-1] < 0.8 * found[0][0]
    assert found[1] == pytest.approx(found[0], rel=2e-5)
