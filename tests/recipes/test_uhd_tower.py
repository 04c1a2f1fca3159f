"""A checkpoint goes on with its tower as a ViT-UHD."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm_vision as mv
from mllm_vision.recipes.uhd_tower import UHDTowerSpec, with_uhd_tower
from mllm_vision.scenes import render, sample_scene
from tests.hosts import HOSTS, picture

BASE = "tiny-llava-scenes"
PROMPT = "USER: <image>\nhow many shapes are there? ASSISTANT:"


def spec(**changed):
    return UHDTowerSpec(**{"base": BASE, "patch_size": 14, "merger_layers": [4], **changed})


@torch.no_grad()
def logits(model, processor, side):
    inputs = processor(images=render(sample_scene("test", 0, side=side)), text=PROMPT, return_tensors="pt")
    return model(**inputs).logits


def test_patches_mergers_and_positions_are_those_asked_for():
    torch.manual_seed(0)
    model, processor = with_uhd_tower(spec(merger="adaptive"), 280)
    stock, stock_processor = mv.load(BASE)
    tower = model.model.vision_tower.config
    assert (tower.patch_size, tower.merger_layers, tower.merger, tower.position_grid) == (
        14,
        (4,),
        "adaptive",
        (20, 20),
    )
    kept = [name for name in stock.state_dict() if "vision_tower" not in name]
    assert kept and all(torch.equal(model.state_dict()[name], stock.state_dict()[name]) for name in kept)
    inputs = processor(images=render(sample_scene("test", 0, side=280)), text=PROMPT, return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 100
    assert inputs["pixel_values"].shape == (400, 3, 14, 14)
    assert processor.image_processor.image_mean == stock_processor.image_processor.image_mean
    assert processor.image_processor.image_std == stock_processor.image_processor.image_std
    assert with_uhd_tower(spec(merger="average"), 280)[0].num_parameters() < model.num_parameters()
    # A smaller picture is enlarged to as many pixels, a larger one keeps more tokens.
    assert [processor.image_processor.token_count(side, side) for side in (140, 280, 364)] == [100, 100, 169]


def test_it_is_saved_and_loaded_as_any_other(tmp_path):
    torch.manual_seed(0)
    model, processor = with_uhd_tower(spec(patch_size=28, merger_layers=[4]), 280)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    again, its_processor = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    assert torch.equal(logits(again, its_processor, side=280), logits(model, processor, side=280))


@pytest.mark.parametrize(
    ("host", "tokens"),
    [("llava-siglip", 36), ("llava-clip-two-layers-full", 36), ("llava-next", None), ("qwen2.5-vl", None)],
)
def test_any_host_that_takes_pictures_of_any_size_may_be_the_base(tmp_path, host, tokens):
    (row,) = (row for row in HOSTS if row.name == host)
    toy = spec(base=str(row.save(tmp_path)), patch_size=7, merger_layers=[3])
    if tokens is None:
        with pytest.raises(ValueError, match=r"cannot (take|convert) a tower"):
            with_uhd_tower(toy, 84)
        return
    model, processor = with_uhd_tower(toy, 84)
    inputs = processor(images=picture(0), text="<image> What?", return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == model.config.image_seq_length == tokens
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    ("changed", "side", "message"),
    [
        ({}, 294, "side must be a multiple of 28 pixels .* got 294"),
        ({"merger_layers": [8]}, 280, "vision_feature_layer -2 is ahead of the merger behind layer 8"),
        ({"merger": "max"}, 280, "merger must be one of average, adaptive"),
    ],
)
def test_what_cannot_be_is_refused(changed, side, message):
    with pytest.raises(ValueError, match=message):
        with_uhd_tower(spec(**changed), side)
