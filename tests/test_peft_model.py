"""What users do with PEFT models works on quantized ones, and gives what the dense model gives
whose weights are the dequantized ones."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft_models import (
    adapter_layer,
    copy_adapters,
    dense_twin,
    fill_adapters,
    operations,
    relative_error,
    tiny_llama,
    tiny_quantized,
    token_ids,
)

import hqqlora
from hqqlora.peft import HQQLoraLinear

LAYERS = 2 * 7


def config(**options: Any) -> LoraConfig:
    return LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
            **options,
        }
    )


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    return fill_adapters(get_peft_model(tiny_quantized(dtype), config(**options))).eval()


def logits(model: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids(), **options).logits


class TestAgainstTheDenseModel:
    """The float64 model with PEFT's own layers is the truth; ours may be three times as far
    from it as PEFT's own layers are on a dense model in our dtype. Losses are compared token by
    token: in their mean, errors may cancel by chance."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "options",
        [{}, {"use_rslora": True}, {"lora_bias": True}, {"use_dora": True}],
        ids=["lora", "rslora", "lora_bias", "dora"],
    )
    def test_losses_and_gradients(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        if "lora_bias" in options:
            options["target_modules"] = ["q_proj", "v_proj"]
        base = tiny_quantized(dtype)
        twins = {d: dense_twin(base, d) for d in (torch.float64, dtype)}
        ours = fill_adapters(get_peft_model(base, config(**options)))
        models = {"ours": ours}
        for name, twin in (("exact", twins[torch.float64]), ("dense", twins[dtype])):
            models[name] = get_peft_model(twin, config(**options))
            if name == "exact":
                models[name] = models[name].double()
            copy_adapters(ours, models[name])
        results = {name: self.gradients(model) for name, model in models.items()}
        assert set(results["ours"]) == set(results["exact"])
        assert len(results["ours"]) > 4
        for name, exact in results["exact"].items():
            allowed = 3 * relative_error(results["dense"][name], exact)
            assert relative_error(results["ours"][name], exact) <= allowed + 1e-6, name

    @staticmethod
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        ids = token_ids()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        logits = output.logits.detach().double()[:, :-1].transpose(1, 2)
        return {
            "losses": nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none"),
            **{n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        }

    def test_every_layer_is_fused_in_both_directions(self) -> None:
        model = adapted().train()
        ids = token_ids()
        with operations() as seen:
            model(input_ids=ids, labels=ids).loss.backward()
        assert seen.counts == {"lora_linear": LAYERS, "lora_linear_backward": LAYERS}


class TestAdapters:
    def test_a_new_one_changes_nothing(self) -> None:
        base = tiny_quantized()
        before = logits(base)
        assert torch.equal(logits(get_peft_model(base, config())), before)

    def test_several(self) -> None:
        model = adapted()
        first = logits(model)
        model.add_adapter("other", config(r=2, target_modules=["q_proj", "o_proj"]))
        fill_adapters(model, seed=8)
        model.set_adapter("default")
        default = logits(model)
        model.set_adapter("other")
        other = logits(model)
        assert not torch.equal(default, other)
        assert not torch.equal(default, first)  # fill_adapters gave new values to both
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(tiny_quantized()))
        assert torch.equal(logits(model), other)
        model.set_adapter("default")
        assert torch.equal(logits(model), default)
        model.delete_adapter("other")
        assert torch.equal(logits(model), default)

    def test_only_the_active_one_is_trained(self) -> None:
        model = adapted()
        model.add_adapter("other", config())
        model.set_adapter("other")
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert all(".other." in n for n in trained)

    def test_a_mixed_batch_gives_each_row_its_adapter(self) -> None:
        model = adapted()
        model.add_adapter("other", config(r=2))
        fill_adapters(model, seed=8)
        rows = {}
        for name in ("default", "other"):
            model.set_adapter(name)
            rows[name] = logits(model)
        with model.disable_adapter():
            rows["__base__"] = logits(model)
        for names in (["other", "default"], ["__base__", "other"]):
            mixed = logits(model, adapter_names=names)
            for i, name in enumerate(names):
                assert relative_error(mixed[i], rows[name][i]) < 1e-5

    @torch.no_grad()
    def test_weighted_sums_of_adapters(self) -> None:
        model = adapted()
        model.add_adapter("other", config())
        fill_adapters(model, seed=8)
        model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum", "cat")
        layer = adapter_layer(model)
        expected = 0.5 * layer.get_delta_weight("default") + 2 * layer.get_delta_weight("other")
        assert relative_error(layer.get_delta_weight("sum"), expected) < 1e-5

    def test_other_modules_are_trained_and_saved_whole(self, tmp_path: Path) -> None:
        model = adapted(modules_to_save=["lm_head"]).train()
        ids = token_ids()
        model(input_ids=ids, labels=ids).loss.backward()
        head = model.base_model.model.lm_head
        assert head.modules_to_save["default"].weight.grad is not None
        head.modules_to_save["default"].weight.data += 1
        y = logits(model.eval())
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny_quantized(), tmp_path).eval()
        assert torch.equal(logits(again), y)

    def test_target_modules_none_takes_pefts_list(self) -> None:
        model = get_peft_model(tiny_quantized(), config(target_modules=None))
        adapted = {n.rpartition(".")[2] for n, m in model.named_modules() if _is_ours(m)}
        assert adapted == {"q_proj", "v_proj"}


class TestFiles:
    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    @pytest.mark.parametrize("use_dora", [True, False])
    def test_saving_and_loading(
        self, tmp_path: Path, low_cpu_mem_usage: bool, use_dora: bool
    ) -> None:
        model = adapted(use_dora=use_dora, lora_dropout=0.1)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(
            tiny_quantized(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert isinstance(adapter_layer(again), HQQLoraLinear)
        if use_dora:  # torch's own small products depend on where a tensor lies in memory
            assert relative_error(logits(again), logits(model)) < 1e-6
        else:
            assert torch.equal(logits(again), logits(model))

    def test_the_files_are_those_of_a_dense_model(self, tmp_path: Path) -> None:
        for name, base in (("quantized", tiny_quantized()), ("dense", tiny_llama())):
            fill_adapters(get_peft_model(base, config())).save_pretrained(tmp_path / name)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            sizes = {len((tmp_path / n / file).read_bytes()) for n in ("quantized", "dense")}
            assert len(sizes) == 1

    def test_an_adapter_moves_between_the_dense_and_the_quantized_model(
        self, tmp_path: Path
    ) -> None:
        base = tiny_quantized()
        twin = dense_twin(base, torch.float32)
        model = fill_adapters(get_peft_model(base, config())).eval()
        model.save_pretrained(tmp_path)
        dense = PeftModel.from_pretrained(twin, tmp_path).eval()
        assert type(adapter_layer(dense)).__module__ == "peft.tuners.lora.layer"
        assert relative_error(logits(model), logits(dense)) < 1e-5

    def test_our_own_adapter_files(self, tmp_path: Path) -> None:
        model = adapted()
        model.save_pretrained(tmp_path)
        ours = hqqlora.load_adapter(tiny_quantized(), tmp_path).eval()
        assert torch.equal(logits(ours), logits(model))
        hqqlora.save_adapter(ours, tmp_path / "ours")
        again = PeftModel.from_pretrained(tiny_quantized(), tmp_path / "ours").eval()
        assert torch.equal(logits(again), logits(model))

    def test_auto_peft_model(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("hqqlora.transformers")
        tiny_llama().save_pretrained(tmp_path / "base")
        quant = transformers.HqqConfig(nbits=4, group_size=32)
        options = {"quantization_config": quant, "dtype": torch.float32}
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
        model = fill_adapters(get_peft_model(base, config())).eval()
        model.save_pretrained(tmp_path / "adapter")
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **options).eval()
        assert isinstance(adapter_layer(again), HQQLoraLinear)
        assert torch.equal(logits(again), logits(model))


class TestTraining:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_prepared_for_kbit_training(self, dtype: torch.dtype, use_reentrant: bool) -> None:
        base = tiny_quantized(dtype)
        codes = adapter_layer(base).W_q.clone()
        base = prepare_model_for_kbit_training(
            base, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
        )
        assert base.is_gradient_checkpointing
        assert adapter_layer(base).scale.dtype == dtype
        model = get_peft_model(base, config(lora_dropout=0.1)).train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
        ids = token_ids()
        losses = []
        for _ in range(20):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
        assert torch.equal(adapter_layer(model).base_layer.W_q, codes)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_changes_no_gradient(self, use_reentrant: bool) -> None:
        ids = token_ids()
        gradients = []
        for checkpointed in (False, True):
            model = adapted(lora_dropout=0.1).train()
            if checkpointed:
                model.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            torch.manual_seed(2)
            model(input_ids=ids, labels=ids).loss.backward()
            gradients.append(adapter_layer(model).lora_A["default"].weight.grad)
        assert torch.equal(*gradients)

    @pytest.mark.parametrize("training", [True, False])
    def test_torch_compile_sees_one_graph(self, training: bool) -> None:
        model = adapted(lora_dropout=0.1)
        model.add_adapter("other", config())
        model.train(training)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        ids = token_ids()
        losses = []
        for module in (model, compiled):
            torch.manual_seed(2)
            losses.append(module(input_ids=ids, labels=ids).loss)
        assert abs(losses[0] - losses[1]) <= 1e-6 * losses[0]
        losses[1].backward()
        assert adapter_layer(model).lora_A["default"].weight.grad is not None

    def test_generating(self) -> None:
        model = adapted()
        with_cache, without = (
            model.generate(
                input_ids=token_ids(1, 4), max_new_tokens=6, do_sample=False, use_cache=cache
            )
            for cache in (True, False)
        )
        assert torch.equal(with_cache, without)
        assert with_cache.shape == (1, 10)


class TestCopying:
    def test_deepcopy_and_pickle(self) -> None:
        model = adapted()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(other), logits(model))


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, HQQLoraLinear)
