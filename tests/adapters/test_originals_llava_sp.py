"""LLaVA-SP as its repository writes it, converted: golden tokens through the loaded model, LoRA, the refusals."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling

import mllm_vision as mv
from mllm_vision.convert import convert
from mllm_vision.encoding import encode_images
from mllm_vision.projectors import SpatialTokensConfig
from mllm_vision.reducers import HiPruneConfig
from tests.authors import (
    ROWS,
    VOCABULARY,
    config_of_theirs,
    golden,
    names_of_theirs,
    stock,
    write_checkpoint,
    write_tower,
)
from tests.hosts import picture

CASES = {"pooling": "llava_sp_pooling_0", "cropping": "llava_sp_cropping_1"}
FIVE = ", ".join(f"model.conv_{part}.weight" for part in ("12.1", "16.1", "20.1", "24", "4.1"))
VARIANTS = pytest.mark.parametrize("variant", CASES)


def shards(folder, variant, change=lambda weights: None, **changes):
    """A merged checkpoint around the weights of a golden case: grid 24 x 24, widths 32, 16 and 48."""
    model = stock(image_size=336)
    weights = names_of_theirs(model, tower=False) | golden(CASES[variant])[0]
    change(weights)
    config = config_of_theirs(model, write_tower(folder / "clip", model), **changes)
    return write_checkpoint(folder / "original", config, weights)


def lora_folder(folder, variant, *, rslora=False):
    """As their training with LoRA writes it; beside it the base, and what PEFT makes of the two."""
    model = stock(image_size=336)
    theirs = names_of_theirs(model, tower=False)
    language = LlamaForCausalLM(model.config.text_config)
    language.resize_token_embeddings(VOCABULARY)
    language.load_state_dict({key: weight for key, weight in theirs.items() if "mm_projector" not in key})
    write_checkpoint(folder / "vicuna", language.config.to_dict(), language.state_dict())
    settings = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
        use_rslora=rslora,
    )
    trained = get_peft_model(language, settings, low_cpu_mem_usage=False)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    trained.peft_config["default"].base_model_name_or_path = str(folder / "vicuna")
    lora = folder / "original"
    trained.save_pretrained(lora)
    beside = {f"base_model.model.{key}": weight for key, weight in golden(CASES[variant])[0].items()}
    torch.save(beside, lora / "non_lora_trainables.bin")
    config = config_of_theirs(model, write_tower(folder / "clip", model), model_type="llava_llama")
    (lora / "config.json").write_text(json.dumps(config))
    return lora, trained.merge_and_unload().state_dict()


def converted(source, **options):
    out = source.parent / "converted"
    said = convert("llava-sp", str(source), out, **options)
    return AutoModelForImageTextToText.from_pretrained(out).eval(), AutoProcessor.from_pretrained(out), said


@torch.no_grad()
def assert_golden(model, variant):
    """What the model makes of the golden output of the tower is the golden row of tokens."""
    case = golden(CASES[variant])[1]

    def seen(*args, **kwargs):
        states = case["hidden_state"]
        return BaseModelOutputWithPooling(last_hidden_state=states, hidden_states=(states * 0, states, states * 0))

    model.model.vision_tower.forward = seen
    images = encode_images(model, model.vision_slots, {"pixel_values": torch.zeros(2, 3, 336, 336)})
    assert_close(torch.stack([image.features for image in images]), case["image_features"], rtol=0, atol=1e-5)


@VARIANTS
def test_golden_tokens_through_merged_shards(tmp_path, variant):
    model, _, said = converted(shards(tmp_path, variant))
    assert type(model).__name__ == "SlottedLlavaForConditionalGeneration"
    assert model.vision_slots.methods == [SpatialTokensConfig(variant=variant, channels=16, scales=6)]
    stored = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert stored["model_type"] == "mllm_vision_llava"
    given = {} if variant == "cropping" else {"variant": "pooling"}
    operation = {"type": "spatial_tokens", **given, "channels": 16}
    assert stored["mllm_vision"] == {"version": 1, "operations": [operation]}
    parameters = sum(weight.numel() for weight in model.parameters())
    assert said == (
        f"llava, mlp2x_gelu projector; spatial tokens by {variant} at scales 4, 8, 12, 16, 20, 24 of a 24 x 24 grid, "
        f"16 channels; {parameters:,} parameters in float32: {tmp_path / 'converted'}"
    )
    assert_golden(model, variant)


@VARIANTS
def test_golden_tokens_through_a_lora_folder(tmp_path, variant):
    source, _ = lora_folder(tmp_path, variant)
    model, _, _ = converted(source)
    assert_golden(model, variant)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_merged_as_peft_merges_it(tmp_path, rslora):
    source, merged = lora_folder(tmp_path, "pooling", rslora=rslora)
    model, _, _ = converted(source)
    base = names_of_theirs(stock(image_size=336), tower=False)
    ours = model.state_dict()
    for key, expected in merged.items():
        name = key if key == "lm_head.weight" else "model.language_model." + key.removeprefix("model.")
        assert_close(ours[name][: len(expected)], expected)
    key = "layers.1.mlp.down_proj.weight"
    assert (ours[f"model.language_model.{key}"] - base[f"model.{key}"]).abs().max() > 0.1


@torch.no_grad()
def test_the_converted_model_answers_with_spatial_tokens_and_can_be_pruned(tmp_path):
    converted(shards(tmp_path, "cropping"))
    model, processor = mv.load(tmp_path / "converted")
    prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    inputs = processor(images=picture(1, 120, 60), text=prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    assert model(**inputs).logits.shape == (1, length + 6, ROWS)
    mv.apply(model, *model.vision_slots.methods, HiPruneConfig(keep=64))
    assert model(**inputs).logits.shape == (1, length + 6 + 64 - 576, ROWS)
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape == (1, length + 3)


@torch.no_grad()
def test_tiles_have_spatial_tokens_of_their_own(tmp_path):
    """The layout of their scripts for LLaVA-1.6."""
    model = stock("llava_next", image_size=336)
    weights = names_of_theirs(model, tower=False) | golden(CASES["pooling"])[0]
    next_ = {
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[336, 672]],
    }
    config = config_of_theirs(model, write_tower(tmp_path / "clip", model), **next_)
    loaded, processor, _ = converted(write_checkpoint(tmp_path / "original", config, weights))
    assert type(loaded).__name__ == "SlottedLlavaNextForConditionalGeneration"
    inputs = processor(images=picture(1, 60, 120), text="<image>", return_tensors="pt")
    assert loaded(**inputs).logits.shape[1] == inputs["input_ids"].shape[1] + 3 * 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.conv_8.1.weight"), r"missing are conv_8\.1\.weight, surplus are none"),
        (lambda w: w.update({"model.conv_CM.weight": torch.ones(1)}), r"surplus are conv_CM\.weight"),
        (lambda w: w.update({"model.query_4": torch.ones(1)}), r"surplus are query_4"),
        (lambda w: w.pop("model.mm_projector.0.bias"), r"1 missing \(model\.mm_projector\.0\.bias\)"),
        (lambda w: w.pop("model.norm.weight"), r"1 missing \(model\.norm\.weight\)"),
        (lambda w: [w.pop(key) for key in list(w) if "conv" in key], "no spatial branch.*is its layout llava"),
    ],
)
def test_keys_that_do_not_fit_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        converted(shards(tmp_path, "pooling", change))
    assert not (tmp_path / "converted").exists()


def test_the_plain_layout_names_what_it_has_no_place_for(tmp_path):
    with pytest.raises(ValueError, match=rf"7 surplus \({FIVE}, \.\.\.\); is it another layout"):
        convert("llava", str(shards(tmp_path, "pooling")), tmp_path / "converted")


def test_kernels_for_another_grid_than_the_towers_are_named(tmp_path):
    model = stock(image_size=56)
    weights = names_of_theirs(model, tower=False) | golden(CASES["pooling"])[0]
    source = write_checkpoint(
        tmp_path / "original", config_of_theirs(model, write_tower(tmp_path / "clip", model)), weights
    )
    with pytest.raises(ValueError, match="kernels for 24 x 24 patches do not fit a tower that sees 4 x 4"):
        converted(source)
