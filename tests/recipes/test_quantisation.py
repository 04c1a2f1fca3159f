"""4 and 8 bit: the language model is quantised and nothing else, and LoRA trains on it."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

import mllm_vision as mv
from mllm_vision.adapter_folder import save_adapter
from mllm_vision.host import adapter_for
from mllm_vision.projectors import SpatialTokensConfig
from mllm_vision.recipes.lora import LoraSpec, with_lora
from mllm_vision.recipes.quantisation import quantised
from mllm_vision.reducers import HiPruneConfig
from tests.hosts import HOSTS
from tests.recipes.test_lora import expected_layers, step
from tests.test_hosts import mixed_rows

LAYERS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}
METHODS = (SpatialTokensConfig(channels=8, scales=3), HiPruneConfig(keep=1 / 3))


@pytest.fixture
def wide(host, tmp_path):
    """A checkpoint of the host whose language model has widths that 4-bit kernels take, multiples of 64."""
    model = host.model()
    text = model.config.text_config
    text.hidden_size, text.intermediate_size, text.head_dim = 64, 128, 16
    if host.name == "qwen2.5-vl":
        model.config.vision_config.out_hidden_size = 64
        text.rope_parameters["mrope_section"] = [2, 3, 3]
    torch.manual_seed(0)
    host.save(tmp_path / "wide")
    type(model)(model.config).save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.parametrize("kind", LAYERS)
def test_the_language_model_is_quantised_and_nothing_else(host, wide, kind, tmp_path):
    config = quantised(kind, adapter_for(host.model().config), torch.float32)
    model, _ = mv.load(wide, *METHODS, quantization_config=config)
    expected = expected_layers(host, "language")
    assert {name for name, m in model.named_modules() if type(m).__name__ == LAYERS[kind]} == expected
    model.save_pretrained(tmp_path / "slotted")  # and again, where the slots are there when it is loaded
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "slotted")
    assert {name for name, m in again.named_modules() if type(m).__name__ == LAYERS[kind]} == expected
    assert again.config.quantization_config.llm_int8_skip_modules.count("vision_slots") == 1


def test_lora_trains_on_4_bit(host, wide, tmp_path):
    config = quantised("nf4", adapter_for(host.model().config), torch.float32)
    base, _ = mv.load(wide, *METHODS, quantization_config=config)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    lora = with_lora(base, LoraSpec(r=2, alpha=4, options={"init_lora_weights": False}), ["projector"])
    inputs = host.inputs(*mixed_rows())
    step(lora, host, inputs)
    assert [name for name, p in lora.named_parameters() if p.requires_grad and not p.grad.any()] == []
    kept = {
        name.replace(".base_layer", ""): weight for name, weight in base.state_dict().items() if "lora_" not in name
    }
    assert all(torch.equal(kept[name], weight) for name, weight in before.items() if name in kept)
    save_adapter(lora, tmp_path / "adapter", wide)
    with torch.no_grad():
        expected = lora(**inputs).logits
        again, _ = mv.load(tmp_path / "adapter", quantization_config=config)
        assert (again(**inputs).logits - expected).abs().max() < 1e-3  # 4-bit products are not the same bit for bit
        in_full, _ = mv.load(tmp_path / "adapter")
        off = (in_full(**inputs).logits - expected).norm() / expected.norm()
        assert 0 < off < 0.5  # the base that it belongs to, with what quantisation had changed


def test_settings_are_those_of_qlora():
    adapter = adapter_for(HOSTS[0].model().config)
    config = quantised("nf4", adapter, torch.bfloat16)
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantised("int8", adapter, torch.bfloat16).load_in_8bit
