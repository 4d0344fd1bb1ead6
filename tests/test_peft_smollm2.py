"""The real model: what PEFT's own tests ask of HQQ models (which transformers 5 has had no
answer to), from loading to merging."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

from hqqlora.peft import HQQLoraLinear, merge_and_unload
from hqqlora.transformers import HqqConfig

pytestmark = pytest.mark.filterwarnings("ignore:a changed weight:UserWarning")

PROMPT = "The meaning of unit tests is"


def load(folder: Path, nbits: int | None) -> nn.Module:
    from transformers import AutoModelForCausalLM

    options = {"quantization_config": HqqConfig(nbits=nbits, group_size=64)} if nbits else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def tokens(folder: Path) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model.eval()(**inputs).logits


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack((a.float().flatten(), b.float().flatten()))).min().item()


def test_outputs_follow_the_dense_model_through_everything(smollm2: Path) -> None:
    inputs = tokens(smollm2)
    config = LoraConfig(
        target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    torch.manual_seed(0)
    dense = logits(get_peft_model(load(smollm2, None), config), inputs)
    torch.manual_seed(0)
    model = get_peft_model(load(smollm2, nbits=8), config)
    assert sum(isinstance(m, HQQLoraLinear) for m in model.modules()) == 60
    output = logits(model, inputs)
    assert correlation(dense, output) > 0.99
    model.merge_adapter()
    assert correlation(dense, logits(model, inputs)) > 0.99
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs), output)
    exact = merge_and_unload(model, dequantize=True)
    assert (logits(exact, inputs) - output).norm() < 1e-4 * output.norm()


def test_training(smollm2: Path, tmp_path: Path) -> None:
    inputs = tokens(smollm2)
    base = prepare_model_for_kbit_training(load(smollm2, nbits=4))
    before = logits(base, inputs)
    for use_dora in (False, True):
        config = LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "v_proj"],
            lora_dropout=0.05,
            task_type="CAUSAL_LM",
            use_dora=use_dora,
        )
        model = get_peft_model(base, config).train()
        trainable, total = model.get_nb_trainable_parameters()
        assert total - trainable == 134_515_008
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 2e-3)
        losses = []
        for _ in range(3):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]
        model.save_pretrained(tmp_path / str(use_dora))
        files = {file.name for file in (tmp_path / str(use_dora)).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files
        base = model.unload()
        assert torch.equal(logits(base, inputs), before)
