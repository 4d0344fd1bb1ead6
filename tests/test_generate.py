"""model.generate on quantized models: greedy and sampling, with cache and padding, before,
while and after an adapter is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_training import NOT_REENTRANT, adapted, losses, quantized, trainer
from torch import Tensor

import hqqlora
from hqqlora import HqqConfig

transformers = pytest.importorskip("transformers")

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
SAMPLING: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.5}
BEAMS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}


pytestmark = pytest.mark.usefixtures("one_thread")


def generated(model: Any, tokens: Tensor | None = None, **options: Any) -> list[list[int]]:
    """What `model` adds to the rows of `tokens`, always with the same draws."""
    torch.manual_seed(0)
    if tokens is None:
        tokens = torch.tensor([[40, 41, 42, 43], [50, 60, 70, 80]])
    options = {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0, **options}
    result = model.generate(input_ids=tokens, **options)
    return [row.tolist() for row in result[:, tokens.shape[1] :]]


# ---- the model itself --------------------------------------------------------------------


def test_smollm2_says_what_its_dequantized_form_says(smollm2: Path):
    """In float32, token for token: with the cache, without, and in a batch whose rows are
    padded on the left."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2,
        dtype=torch.float32,
        quantization_config=HqqConfig(nbits=4, group_size=64),
        device_map="cpu",
    )
    prompts = ["The capital of France is", "Water is made of two elements, which are called"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    shorter, longer = mask.sum(1).tolist()
    assert shorter < longer
    together = generated(model, tokens, **GREEDY, attention_mask=mask)
    rows = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
    assert tokenizer.decode(together[0]).startswith(" Paris")
    assert generated(model, rows[0], **GREEDY) == [together[0]]
    assert generated(model, rows[0], **GREEDY, use_cache=False) == [together[0]]

    dense = model.dequantize()
    assert generated(dense, tokens, **GREEDY, attention_mask=mask) == together
    assert generated(dense, rows[1], **GREEDY) == [together[1]]


@pytest.mark.parametrize(
    "options", [GREEDY, SAMPLING, BEAMS], ids=["greedy", "sampled", "beams"]
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "t5"])
def test_every_way_to_choose_tokens(tmp_path: Path, family: str, options: dict[str, Any]):
    folder = tiny_models.save_tiny(tiny_models.tiny_model(family), tmp_path)
    kind = "Seq2SeqLM" if family == "t5" else "CausalLM"
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
        folder, quantization_config=HqqConfig(nbits=4, group_size=32)
    )
    found = generated(model, **options)
    assert generated(model, **options, use_cache=False) == found
    assert generated(model.dequantize(), **options) == found
    assert generated(model, **{**SAMPLING, "temperature": 9.0}) != found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits(tiny: Path, dtype: torch.dtype):
    model = quantized(tiny, dtype)
    found = generated(model, **GREEDY)
    assert generated(model, **GREEDY) == found
    # Against the row alone, and with two more tokens: in a batch of two, or for more tokens,
    # another kernel may serve, with its own rounding.
    padded = torch.tensor([[0, 0, 41, 42, 43]])
    mask = (padded != 0).long()
    alone = generated(model, padded[:, 2:], **GREEDY)
    assert generated(model, padded, **GREEDY, attention_mask=mask) == alone


def test_a_static_cache(tiny: Path):
    model = quantized(tiny)
    found = generated(model, **GREEDY, cache_implementation="static", disable_compile=True)
    assert found == generated(model, **GREEDY)


# ---- with adapters -----------------------------------------------------------------------

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")


class Speaker(transformers.TrainerCallback):
    """Generates after every step, from the model as it is."""

    def __init__(self) -> None:
        self.said: list[list[list[int]]] = []

    def on_step_end(self, *arguments: Any, model: Any, **rest: Any) -> None:
        state = torch.get_rng_state()
        assert model.training
        model.eval()
        self.said.append(generated(model, **GREEDY))
        model.train()
        torch.set_rng_state(state)


@pytest.mark.parametrize("arguments", [{}, {"bf16": True}, NOT_REENTRANT], ids=str)
def test_generating_does_not_disturb_training(
    tiny: Path, tmp_path: Path, arguments: dict[str, Any]
):
    expected = trainer(adapted(quantized(tiny), lora_dropout=0.3), tiny, tmp_path, **arguments)
    expected.train()
    model = adapted(quantized(tiny), lora_dropout=0.3)
    made = trainer(model, tiny, tmp_path, **arguments)
    speaker = Speaker()
    made.add_callback(speaker)
    made.train()
    assert losses(made) == losses(expected)
    assert len({str(said) for said in speaker.said}) > 1  # it has learned something
    model.eval()
    assert generated(model, **GREEDY) == generated(expected.model.eval(), **GREEDY)


@pytest.fixture
def learned(tiny: Path, tmp_path: Path) -> Any:
    """A quantized model, saved as tmp_path/base, with an adapter that has been trained."""
    quantized(tiny).save_pretrained(tmp_path / "base")
    model = adapted(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    trainer(model, tiny, tmp_path / "run").train()
    return model.eval()


@pytest.mark.parametrize("options", [GREEDY, SAMPLING], ids=["greedy", "sampled"])
def test_the_adapter_can_be_switched(tiny: Path, learned: Any, options: dict[str, Any]):
    without = generated(quantized(tiny), **options)
    found = generated(learned, **options)
    assert found != without
    assert generated(learned, **options, use_cache=False) == found
    with learned.disable_adapter():
        assert generated(learned, **options) == without
    learned.base_model.disable_adapter_layers()
    assert generated(learned, **options) == without
    learned.base_model.enable_adapter_layers()
    assert generated(learned, **options) == found


def test_what_was_saved_says_the_same(learned: Any, tmp_path: Path):
    found = generated(learned, **GREEDY)
    learned.save_pretrained(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert generated(again, **GREEDY) == found
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert generated(automatic, **GREEDY) == found


@pytest.mark.filterwarnings("ignore:a changed weight was quantized again")
def test_merged_into_few_bits(learned: Any, tmp_path: Path):
    """What the merged weights say, whoever multiplies them; and saved, and loaded."""
    before = generated(learned, **GREEDY)
    learned.merge_adapter()
    found = generated(learned, **GREEDY)
    learned.unmerge_adapter()
    assert generated(learned, **GREEDY) == before
    merged = learned.merge_and_unload()
    assert generated(merged, **GREEDY) == found
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert generated(again, **GREEDY) == found
    assert generated(again.dequantize(), **GREEDY) == found


def test_merged_without_loss(learned: Any, tmp_path: Path):
    """Into a dense model, which stock transformers loads."""
    found = generated(learned, **GREEDY)
    merged = hqqlora.peft.merge_and_unload(learned, dequantize=True)
    assert generated(merged, **GREEDY) == found
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any(isinstance(module, hqqlora.HQQLinear) for module in again.modules())
    assert generated(again, **GREEDY) == found
