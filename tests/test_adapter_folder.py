"""An adapter knows its base again: in other precisions, but not another model, nor the same trained further."""

import json

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

import mllm_vision as mv
from mllm_vision.adapter_folder import BASE_FILE, Base, attach, save_adapter
from mllm_vision.host import adapter_for
from mllm_vision.projectors import SpatialTokensConfig
from mllm_vision.recipes.lora import LoraSpec, with_lora
from mllm_vision.recipes.quantisation import quantised
from mllm_vision.reducers import HiPruneConfig
from tests.hosts import HOSTS
from tests.test_hosts import mixed_rows

LLAVA, QWEN = HOSTS[0], HOSTS[-1]
ADDED = SpatialTokensConfig(channels=8, scales=3)
PRUNED = HiPruneConfig(keep=1 / 3)


def shaken(model):
    """The model with everything that is trained moved at random."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """The folder of an adapter of the toy LLaVA, with a trained projector."""
    lora = shaken(with_lora(LLAVA.model(), LoraSpec(r=2, alpha=4), ["projector"]))
    save_adapter(lora, tmp_path / "adapter", checkpoint(LLAVA))
    return tmp_path / "adapter"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_base_may_be_of_another_precision(adapter, dtype):
    model, _ = mv.load(adapter, dtype=dtype)
    assert isinstance(model, PeftModel)
    assert mv.api.find_host(model).dtype == dtype
    attach(LLAVA.model().to(dtype).to(torch.float32), adapter)  # rounded on the way


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_base_may_be_quantised(adapter, checkpoint, kind):
    config = quantised(kind, adapter_for(LLAVA.model().config), torch.bfloat16)
    model, _ = mv.load(adapter, quantization_config=config, dtype=torch.bfloat16)
    assert any(
        type(module).__name__.startswith("Linear") and "bit" in type(module).__name__ for module in model.modules()
    )
    other = LLAVA.model()
    torch.nn.init.normal_(other.lm_head.weight)
    other.save_pretrained(LLAVA.save(adapter.parent / "other"))
    with pytest.raises(ValueError, match=r"lm_head\.weight has other values"):
        mv.load(adapter, base=adapter.parent / "other", quantization_config=config)


def test_another_model_of_the_same_shapes_is_refused(host, tmp_path):
    torch.manual_seed(1)
    save_adapter(with_lora(type(host.model())(host.model().config), LoraSpec(r=2, alpha=4)), tmp_path, "the/base")
    torch.manual_seed(2)
    with pytest.raises(ValueError, match=r"trained on the/base, and the model given, .*, is another one"):
        attach(type(host.model())(host.model().config), tmp_path)


@pytest.mark.parametrize("part", ["language_model.layers.1.mlp", "vision_tower.encoder.layers.2", "lm_head"])
def test_a_base_that_was_trained_further_is_refused(adapter, part):
    model = LLAVA.model()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if part in name:
                weight.mul_(1.05)
    with pytest.raises(ValueError, match="or has been trained further"):
        attach(model, adapter)


def test_what_the_adapter_brings_may_differ(adapter):
    model = LLAVA.model()
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_1.weight)
    inputs = LLAVA.inputs(*mixed_rows())
    with torch.no_grad():
        assert_close(attach(model, adapter)(**inputs).logits, mv.load(adapter)[0](**inputs).logits)


def test_another_family_or_another_size_is_refused(adapter):
    with pytest.raises(ValueError, match="a model of type llava, got qwen2_5_vl"):
        attach(QWEN.model(), adapter)
    config = LLAVA.model().config
    config.text_config.intermediate_size = 64
    with pytest.raises(
        ValueError, match=r"is \[(96, 48|48, 96)\], and the model given, Llava.*, has \[(64, 48|48, 64)\]"
    ):
        attach(type(LLAVA.model())(config), adapter)
    config.text_config.num_hidden_layers = 1
    with pytest.raises(ValueError, match="has no such weight"):
        Base.read(adapter).check(type(LLAVA.model())(config))


def test_other_methods_with_weights_are_refused_and_other_reducers_are_not(checkpoint, tmp_path):
    base, _ = mv.load(checkpoint(LLAVA), ADDED, PRUNED)
    save_adapter(shaken(with_lora(base, LoraSpec(r=2, alpha=4))), tmp_path, checkpoint(LLAVA))
    with pytest.raises(
        ValueError, match=r"with SpatialTokensConfig\(.*\), got a model with no method that has weights"
    ):
        attach(LLAVA.model(), tmp_path)
    with pytest.raises(ValueError, match=r"got a model with SpatialTokensConfig\(.*channels=4"):
        mv.load(tmp_path, SpatialTokensConfig(channels=4, scales=3))
    model, _ = mv.load(tmp_path)
    inputs = LLAVA.inputs(*mixed_rows())
    pruned = model(**inputs).logits.shape[1]
    assert mv.api.find_host(model).vision_slots.methods == [ADDED, PRUNED]
    everything, _ = mv.load(tmp_path, HiPruneConfig(keep=36))
    assert mv.api.find_host(everything).vision_slots.methods == [ADDED, HiPruneConfig(keep=36)]
    assert everything(**inputs).logits.shape[1] > pruned


def test_weights_that_an_adapter_brings_are_not_called_untrained(checkpoint, tmp_path, caplog):
    base, _ = mv.load(checkpoint(LLAVA), ADDED)
    save_adapter(with_lora(base, LoraSpec(r=2, alpha=4)), tmp_path, checkpoint(LLAVA))
    assert "untrained weights" in caplog.text
    caplog.clear()
    mv.load(tmp_path)
    assert "untrained weights" not in caplog.text


def test_transformers_alone_loads_it_on_its_base(host, checkpoint, tmp_path):
    base, _ = mv.load(checkpoint(host), ADDED, PRUNED)
    base.save_pretrained(tmp_path / "base")
    lora = shaken(with_lora(base, LoraSpec(target=["language", "tower"], r=2, alpha=4), ["projector"]))
    save_adapter(lora, tmp_path / "adapter", tmp_path / "base")
    inputs = host.inputs(*mixed_rows())
    with torch.no_grad():
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")
        assert_close(model(**inputs).logits, lora(**inputs).logits)


def test_weights_that_were_gathered_are_what_is_saved(tmp_path):
    lora = with_lora(LLAVA.model(), LoraSpec(r=2, alpha=4), ["projector"])
    gathered = {name: torch.randn_like(p) for name, p in lora.named_parameters() if p.requires_grad}  # as of ZeRO-3
    save_adapter(lora, tmp_path, "the/base", gathered)
    again = attach(LLAVA.model(), tmp_path)
    assert all(torch.equal(again.get_parameter(name), weight) for name, weight in gathered.items())


def test_it_is_trained_further_and_saved_again(adapter, tmp_path, checkpoint):
    model = attach(LLAVA.model(), adapter, is_trainable=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n or "modules_to_save" in n
    }
    save_adapter(shaken(model), tmp_path / "again", checkpoint(LLAVA))
    read = [json.loads((folder / BASE_FILE).read_text()) for folder in (adapter, tmp_path / "again")]
    assert read[0] == read[1]
    assert not any("projector" in name for name in read[0]["weights"])
    assert len(read[0]["weights"]) == 32 + 30  # of the tower, and all of the language model


def test_the_trainer_resumes_it_bit_for_bit(host, tmp_path):
    lora = shaken(with_lora(mv.apply(host.model(), ADDED), LoraSpec(target="all", r=2, alpha=4)))
    expected = {name: p.clone() for name, p in lora.named_parameters()}
    trainer = Trainer(lora, TrainingArguments(output_dir=tmp_path, report_to="none"))
    trainer.save_model(tmp_path / "checkpoint-1")
    shaken(lora)
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert [name for name, p in lora.named_parameters() if not torch.equal(p, expected[name])] == []


def test_folders_that_are_not_whole_are_refused(adapter):
    stored = json.loads((adapter / BASE_FILE).read_text())
    (adapter / BASE_FILE).write_text(json.dumps(stored | {"version": 2}))
    with pytest.raises(ValueError, match="is of version 2, this mllm_vision reads 1"):
        mv.load(adapter)
    (adapter / BASE_FILE).unlink()
    with pytest.raises(ValueError, match=f"without {BASE_FILE}"):
        mv.load(adapter)
    with pytest.raises(ValueError, match="only a model from with_lora or attach"):
        save_adapter(PeftModel.from_pretrained(LLAVA.model(), adapter), adapter, "the/base")
