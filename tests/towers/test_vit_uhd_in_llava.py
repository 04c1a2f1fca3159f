"""A ViT-UHD as the tower of a stock host: what its processor writes, pictures of any kind and size, what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models
from torch.testing import assert_close
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaNextConfig, PreTrainedTokenizerFast

import mllm_vision as mv
from mllm_vision.encoding import see_images
from mllm_vision.host import adapter_for
from mllm_vision.reducers import HiPruneConfig
from mllm_vision.slots import Slots
from mllm_vision.tokens import AttentionReceived
from mllm_vision.towers import ViTUHDConfig, ViTUHDImageProcessor, ViTUHDModel, ViTUHDProcessor
from tests.hosts import HOSTS, picture, rows_of_pixels

HOST = next(host for host in HOSTS if host.name == "llava-vit-uhd")
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def pictures():
    """One of each kind that arrives from outside, of every shape."""
    rotated = picture(3, 60, 100)
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.info["exif"] = exif.tobytes()
    return [
        Image.new("RGB", (1, 1)),
        picture(1, 400, 20),
        Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)),
        picture(2).convert("CMYK"),
        picture(2).convert("P"),
        picture(2).convert("RGBA"),
        rotated,
    ]


@torch.no_grad()
def test_pictures_of_every_kind_and_size_are_answered_about_alone_and_together():
    model, rows = HOST.model(), [(f"What is it? {{}} {i}", [image]) for i, image in enumerate(pictures())]
    batch = HOST.inputs(*rows)
    marks = (batch["input_ids"] == model.config.image_token_id).sum(1)
    assert marks.tolist() == (batch["image_sizes"] // 14).prod(1).tolist()
    together = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    for row, expected in zip(rows, together, strict=True):
        alone = HOST.inputs(row)
        assert torch.equal(model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :], expected)


@torch.no_grad()
def test_an_image_of_one_token_is_enough():
    processor = ViTUHDProcessor(
        ViTUHDImageProcessor(patch_size=7, merge_size=2, min_pixels=100, max_pixels=400), HOST.processor.tokenizer
    )
    inputs = processor(images=[Image.new("RGB", (9, 9))], text=["<image> What?"], return_tensors="pt")
    assert inputs["image_sizes"].tolist() == [[14, 14]]
    model = HOST.model()
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 1
    listed = dict(inputs, image_sizes=inputs["image_sizes"].tolist())
    stock = model(**inputs).logits
    assert_close(mv.apply(model, HiPruneConfig(keep=5))(**inputs).logits, stock)
    assert_close(model(**listed).logits, stock)


@torch.no_grad()
def test_the_host_is_given_what_the_tower_and_its_projector_make():
    inputs, model = HOST.inputs(("{} and {}?", [picture(1), picture(2, 120, 60)])), HOST.model()
    tower = ViTUHDModel(model.config.vision_config).eval()
    tower.load_state_dict(model.model.vision_tower.state_dict())
    tokens = model.model.multi_modal_projector(tower(inputs["pixel_values"], inputs["image_sizes"]).last_hidden_state)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    embeddings[inputs["input_ids"] == model.config.image_token_id] = tokens[0]
    assert_close(model(**inputs).logits, model(inputs_embeds=embeddings).logits)


@torch.no_grad()
def test_evidence_from_the_finer_grid_ahead_of_a_merger_is_the_mean_of_its_window():
    inputs, model = HOST.inputs(("{}", [picture(1, 84, 112)])), HOST.model()
    model.model.vision_tower.set_attn_implementation("eager")
    tower = model.model.vision_tower
    maps = tower(inputs["pixel_values"], inputs["image_sizes"], output_attentions=True).attentions
    early, late = AttentionReceived(1), AttentionReceived(6)
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    [(_, tokens)] = see_images(model, Slots([], model.config), images, [early, late]).groups
    assert tokens.grid == (8, 6)
    fine, coarse = (maps[layer][0][0].mean(0).sum(0) for layer in (1, 6))
    assert_close(tokens.evidence[early][0], fine.view(8, 2, 6, 2).mean((1, 3)).flatten())
    assert_close(tokens.evidence[late][0], coarse)


def test_the_processor_is_saved_and_found_and_keeps_its_template(tmp_path):
    processor = ViTUHDProcessor(HOST.processor.image_processor, HOST.processor.tokenizer, chat_template="{{ 1 }}")
    processor.save_pretrained(tmp_path)
    HOST.model().save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is ViTUHDProcessor
    assert (loaded.chat_template, loaded.image_processor.merge_size) == ("{{ 1 }}", 2)
    text, images = ["<image> a <image>"], [picture(1), picture(2, 60, 200)]
    for name, tensor in loaded(images=images, text=text, return_tensors="pt").items():
        assert torch.equal(tensor, processor(images=images, text=text, return_tensors="pt")[name])
    model, found = mv.load(tmp_path)
    assert type(model) is LlavaForConditionalGeneration
    assert type(found) is ViTUHDProcessor


def test_servers_are_told_how_many_tokens_a_picture_will_be():
    sizes = [(1, 1), (300, 40), (84, 112)]
    images = [Image.new("RGB", (width, height)) for height, width in sizes]
    for settings in ({}, {"min_pixels": 1000, "max_pixels": 56 * 56}):
        told = HOST.processor._get_num_multimodal_tokens(sizes, **settings)
        made = HOST.processor(images=images, text=["<image>"] * 3, padding=True, return_tensors="pt", **settings)
        marks = (made["input_ids"] == HOST.processor.image_token_id).sum(1)
        assert told["num_image_tokens"] == marks.tolist() == (made["image_sizes"] // 14).prod(1).tolist()
        assert told["num_image_patches"] == rows_of_pixels(made)
        assert sum(told["num_image_patches"]) == len(made["pixel_values"])
    assert HOST.processor._get_num_multimodal_tokens()["num_image_tokens"] is None


def test_settings_of_a_call_count_for_the_placeholders_too():
    inputs = HOST.processor(
        images=[picture(1, 112, 112)], text=["<image>"], min_pixels=1000, max_pixels=56 * 56, return_tensors="pt"
    )
    assert inputs["image_sizes"].tolist() == [[56, 56]]
    assert (inputs["input_ids"] == HOST.processor.image_token_id).sum() == 16


def test_a_tokenizer_without_the_mark_is_refused():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    unknowing = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")  # to which every word is one token
    for tokenizer, mark in ((HOST.processor.tokenizer, "<picture>"), (unknowing, "<image>")):
        with pytest.raises(ValueError, match=f"'{mark}' is no token of this tokenizer; add it as a special token"):
            ViTUHDProcessor(HOST.processor.image_processor, tokenizer, image_token=mark)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(vision_feature_select_strategy="default"), "no CLS token for .* to leave out; set it to 'full'"),
        (dict(vision_feature_layer=3), "vision_feature_layer 3 is ahead of the merger behind layer 3"),
        (dict(vision_feature_layer=[-1, -7]), "vision_feature_layer -7 is ahead of the merger"),
    ],
)
def test_settings_of_the_host_that_do_not_fit_the_tower(settings, message):
    model = HOST.model()
    for name, value in settings.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        mv.apply(model, HiPruneConfig(keep=4))


@torch.no_grad()
def test_layers_behind_the_last_merger_may_be_taken_together():
    model, inputs = HOST.model(), HOST.inputs(("{} and {}?", [picture(1), picture(2, 120, 60)]))
    model.config.vision_feature_layer = [4, -1]
    model.model.multi_modal_projector = type(model.model.multi_modal_projector)(model.config)
    stock = model(**inputs).logits
    assert_close(mv.apply(model, HiPruneConfig(keep=1000))(**inputs).logits, stock)


def test_what_is_missing_or_of_another_host_is_said():
    model = mv.apply(HOST.model(), HiPruneConfig(keep=4))
    inputs = HOST.inputs(("{}", [picture(1)]))
    del inputs["image_sizes"]
    with pytest.raises(ValueError, match="image_sizes is missing; pass all that the processor of this model returns"):
        model(**inputs)
    config = LlavaNextConfig(vision_config=ViTUHDConfig(), text_config=model.config.text_config)
    with pytest.raises(ValueError, match="vision tower 'vit_uhd' is not supported; supported are clip_vision_model"):
        adapter_for(config).facts(config)
