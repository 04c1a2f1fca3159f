"""HiPrune against tensors that the authors' code produced (tests/golden; each case names repository and commit)."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
)

import mllm_vision as mv
from mllm_vision.encoding import encode_images
from mllm_vision.reducers import HiPruneConfig
from mllm_vision.tokens import AttentionReceived

GOLDEN = Path(__file__).parent.parent / "golden"
TEXT = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
)


def read(name):
    with safe_open(GOLDEN / name / "case.safetensors", "pt") as case:
        tensors = {key: case.get_tensor(key) for key in case.keys()}  # noqa: SIM118
    return {key: t.float() if t.dtype == torch.float16 else t for key, t in tensors.items()}


def with_tower(model_class, config_class, name, attention):
    tower = CLIPVisionModel.from_pretrained(GOLDEN / name / "tower", attn_implementation=attention)
    config = config_class(vision_config=tower.config, text_config=TEXT, image_token_index=39)
    torch.manual_seed(0)
    model = model_class(config).eval()
    model.model.vision_tower = tower.eval()
    return model


def kept_mask(kept, size):
    mask = torch.zeros(len(kept), size, dtype=torch.bool)
    for row, tile in zip(mask, kept, strict=True):
        row[tile.patch_index] = True
    return mask


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llava15_keep192(attention):
    case = read("hiprune_llava15_keep192")
    model = with_tower(LlavaForConditionalGeneration, LlavaConfig, "hiprune_llava15_keep192", attention)
    mv.apply(model, HiPruneConfig(keep=192, object_layer=2, neighbours="flat"))
    kept = mv.inspect_tokens(model, pixel_values=case["pixel_values"])
    assert torch.equal(kept_mask(kept, 576), case["kept_mask"])
    (image,) = encode_images(model, model.vision_slots, {"pixel_values": case["pixel_values"]})
    # Theirs is a mean over the 577 queries, ours a sum.
    for layer, name in ((2, "object_layer_scores"), (4, "deep_layer_scores")):
        torch.testing.assert_close(image.on_patches.evidence[AttentionReceived(layer)] / 577, case[name])


def test_llava_next_5_tiles_keep640():
    name = "hiprune_llava_next_5tiles_keep640"
    case = read(name)
    model = with_tower(LlavaNextForConditionalGeneration, LlavaNextConfig, name, "sdpa")
    mv.apply(model, HiPruneConfig(keep=640, object_layer=2, neighbours="flat", budget="tile"))
    inputs = {"pixel_values": case["pixel_values"][None], "image_sizes": torch.tensor([[672, 672]])}
    assert torch.equal(kept_mask(mv.inspect_tokens(model, **inputs), 576), case["kept_mask"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_qwen2_5_vl_keeps_a_third(attention):
    case = read("hiprune_qwen2_5_vl_r0334")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        GOLDEN / "hiprune_qwen2_5_vl_r0334" / "model", attn_implementation=attention
    ).eval()
    mv.apply(model, HiPruneConfig(keep=0.334, object_layer=2, neighbours="flat"))
    images = {"pixel_values": case["pixel_values"], "image_grid_thw": case["image_grid_thw"]}
    assert torch.equal(kept_mask(mv.inspect_tokens(model, **images), 140)[0], case["kept_mask"])
    positions = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: positions.update(ids=kwargs["position_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        logits = model(input_ids=case["input_ids"], **images).logits
    hook.remove()
    assert torch.equal(positions["ids"], case["position_ids"])
    # Another release of transformers made these logits.
    torch.testing.assert_close(logits, case["logits"], atol=1e-3, rtol=1e-3)
