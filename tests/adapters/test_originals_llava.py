"""LLaVA-1.5 and 1.6 as their repository writes them, converted: the logits, the prompt, the pictures, the refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from mllm_vision.convert import convert
from tests.authors import (
    PINPOINTS,
    VOCABULARY,
    config_of_theirs,
    ids_of_theirs,
    names_of_theirs,
    sentence_pieces,
    stock,
    write_checkpoint,
    write_tower,
)
from tests.hosts import picture

VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. "
)
NEXT = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS}


def written(folder, model, kind="bin", *, tower=False, **changes):
    """A checkpoint of the repository, with its tower beside it."""
    clip = write_tower(folder / "clip", model)
    return write_checkpoint(
        folder / "original", config_of_theirs(model, clip, **changes), names_of_theirs(model, tower=tower), kind=kind
    )


def converted(source, **options):
    out = source.parent / "converted"
    convert("llava", str(source), out, **options)
    return AutoModelForImageTextToText.from_pretrained(out).eval(), AutoProcessor.from_pretrained(out)


def asked(processor, *images):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is left?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(images=list(images), text=[prompt] * len(images), return_tensors="pt", padding=True)


@torch.no_grad()
def assert_same_logits(model, reference, inputs):
    assert type(model) is type(reference)
    written = inputs["attention_mask"].bool()
    ours, expected = model(**inputs).logits[written], reference(**inputs).logits[written]
    assert_close(ours[:, :VOCABULARY], expected[:, :VOCABULARY], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("tower", [False, True], ids=["tower apart", "tower inside"])
def test_llava_gives_the_logits_back(tmp_path, kind, tower):
    reference = stock()
    model, processor = converted(written(tmp_path, reference, kind, tower=tower))
    assert_same_logits(model, reference, asked(processor, picture(1), picture(2)))
    for part in ("vision_config", "text_config"):
        theirs, ours = getattr(reference.config, part).to_dict(), getattr(model.config, part).to_dict()
        assert {name: ours[name] for name in theirs if name != "dtype"} == {
            n: v for n, v in theirs.items() if n != "dtype"
        }
    assert model.config.image_seq_length == 16
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 351)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_their_dtype(tmp_path, dtype):
    reference = stock(dtype=dtype)
    clip = write_tower(tmp_path / "clip", reference.float())  # openai's is in float32
    weights = names_of_theirs(reference.to(dtype), tower=False)
    source = write_checkpoint(tmp_path / "original", config_of_theirs(reference, clip), weights)
    model, _ = converted(source)
    assert {weight.dtype for weight in model.state_dict().values()} == {dtype}
    expected = reference.state_dict()
    for name, weight in model.state_dict().items():
        rows = VOCABULARY if weight.shape[:1] == (384,) else len(weight)
        assert_close(weight[:rows], expected[name][:rows], rtol=0, atol=0)


def test_new_rows_are_the_mean_of_the_old(tmp_path):
    reference = stock()
    model, _ = converted(written(tmp_path, reference))
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        grown, old = model.state_dict()[name], reference.state_dict()[name][:VOCABULARY]
        assert grown.shape == (384, 48)
        assert_close(grown[VOCABULARY:], old.mean(dim=0).expand(34, -1))


@pytest.mark.parametrize(("kind", "model_type"), [("llava_next", "llava_llama"), ("mistral", "llava_mistral")])
def test_llava_next_gives_the_logits_back(tmp_path, kind, model_type):
    reference = stock(kind)
    source = written(tmp_path, reference, "safetensors", tower=True, model_type=model_type, **NEXT)
    model, processor = converted(source)
    assert processor.image_processor.image_grid_pinpoints == [[h, w] for w, h in PINPOINTS]
    assert_same_logits(model, reference, asked(processor, picture(1, 120, 60), picture(2, 60, 120)))


def test_pinpoints_may_be_text(tmp_path):
    source = written(tmp_path, stock("llava_next"), tower=True, **NEXT | {"image_grid_pinpoints": str(PINPOINTS)})
    model, _ = converted(source)
    assert model.config.image_grid_pinpoints == [[h, w] for w, h in PINPOINTS]


@torch.no_grad()
def test_a_linear_projector_is_held_exactly(tmp_path):
    reference = stock()
    weights = names_of_theirs(reference, tower=False)
    for part in ("weight", "bias"):
        weights[f"model.mm_projector.{part}"] = weights.pop(f"model.mm_projector.0.{part}")
        del weights[f"model.mm_projector.2.{part}"]
    config = config_of_theirs(reference, write_tower(tmp_path / "clip", reference), mm_projector_type="linear")
    model, _ = converted(write_checkpoint(tmp_path / "original", config, weights))
    features = torch.randn(2, 16, 32)
    expected = reference.model.multi_modal_projector.linear_1(features)
    assert_close(model.model.multi_modal_projector(features), expected, rtol=0, atol=0)


def test_the_cls_token_is_kept_where_they_kept_it(tmp_path):
    reference = stock()
    reference.config.vision_feature_select_strategy = "full"
    source = written(tmp_path, reference, mm_vision_select_feature="cls_patch", mm_vision_select_layer=-3)
    reference.config.vision_feature_layer = -3
    model, processor = converted(source)
    inputs = asked(processor, picture(1))
    assert int((inputs["input_ids"] == 350).sum()) == model.config.image_seq_length == 17
    assert_same_logits(model, reference, inputs)


def test_prompt_and_ids_are_theirs(tmp_path):
    _, processor = converted(written(tmp_path, stock()))
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is  left? Ünï"}]},
        {"role": "assistant", "content": "They are drawn."},
        {"role": "user", "content": "How many?"},
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    turns = "USER: <image>\nWhat is  left? Ünï ASSISTANT: They are drawn.</s>USER: How many? ASSISTANT:"
    assert prompt == VICUNA + turns
    system = [{"role": "system", "content": "Be brief."}, *messages[2:]]
    assert processor.apply_chat_template(system) == "Be brief. USER: How many? "
    prompt = VICUNA + "USER: <image>\nWhat is  left? Ünï ASSISTANT:"
    ids = processor(images=picture(1), text=prompt)["input_ids"][0]
    assert ids == ids_of_theirs(prompt.replace("<image>", "<image>" * 16), 350)
    tokenizer = processor.tokenizer
    assert tokenizer.decode(tokenizer("What is left?").input_ids, skip_special_tokens=True) == "What is left?"
    assert (tokenizer.padding_side, tokenizer.pad_token, len(tokenizer)) == ("left", "<pad>", 352)
    assert tokenizer("a</s>").input_ids[-1] == tokenizer.eos_token_id == 2


def test_mistral_is_asked_as_they_ask_it(tmp_path):
    _, processor = converted(written(tmp_path, stock("mistral"), tower=True, model_type="llava_mistral", **NEXT))
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": "How?"},
    ]
    assert processor.apply_chat_template(messages) == "[INST] <image>\nWhat? [/INST] That. </s>[INST] How? [/INST]"
    system = [{"role": "system", "content": "Be brief."}, *messages[2:]]
    assert processor.apply_chat_template(system) == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHow? [/INST]"


def test_a_tokenizer_json_is_taken_as_it_is(tmp_path):
    source = written(tmp_path, stock())
    _, first = converted(source)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "converted", padding_side="right")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.pad_token = tokenizer.unk_token  # as in Vicuna's
    tokenizer.save_pretrained(source)
    (source / "tokenizer.model").unlink()
    _, processor = converted(source, overwrite=True)
    text = "USER: <image>\nWhat is left?"
    assert processor.tokenizer(text).input_ids == first.tokenizer(text).input_ids
    assert processor.tokenizer.pad_token_id == first.tokenizer.pad_token_id
    assert processor.tokenizer.padding_side == "left"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>"
        "<|im_start|>assistant\n"
    )


def test_tokens_that_they_added_keep_their_ids(tmp_path):
    source = written(tmp_path, stock())
    (source / "added_tokens.json").write_text(json.dumps({"<b>": 351, "<a>": 350}))
    _, processor = converted(source)
    tokens = ["<a>", "<b>", "<image>", "<pad>"]
    assert processor.tokenizer.convert_tokens_to_ids(tokens) == [350, 351, 352, 353]


def test_pieces_defined_by_hand_are_refused(tmp_path):
    source = written(tmp_path, stock())
    (source / "tokenizer.model").write_bytes(sentence_pieces("<|im_start|>"))
    with pytest.raises(ValueError, match=r"1 pieces defined by hand \(<\|im_start\|>\).*tokenizer\.json"):
        converted(source)


def test_pictures_are_padded_where_they_padded(tmp_path):
    """The mean colour around a wide picture, as the repository's expand2square, then resized."""
    _, processor = converted(written(tmp_path, stock()))
    wide = picture(3, 112, 56)
    square = Image.new("RGB", (112, 112), tuple(int(x * 255) for x in (0.48145466, 0.4578275, 0.40821073)))
    square.paste(wide, (0, 28))
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    levels = np.asarray(square.resize((56, 56), Image.Resampling.BICUBIC)) / 255
    expected = torch.tensor((levels - mean) / std).permute(2, 0, 1)[None].float()
    assert_close(processor.image_processor(wide, return_tensors="pt")["pixel_values"], expected)


def test_pictures_are_cropped_where_they_cropped(tmp_path):
    _, processor = converted(written(tmp_path, stock(), image_aspect_ratio="square"))
    wide = picture(3, 112, 56)
    pixels = [
        processor.image_processor(image, return_tensors="pt")["pixel_values"]
        for image in (wide, wide.crop((28, 0, 84, 56)))
    ]
    assert_close(*pixels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type 'mlp3x_gelu', expected one of mlp2x_gelu, linear"),
        ({"model_type": "llava_mpt"}, "model_type 'llava_mpt', expected one of llava, llava_llama, llava_mistral"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature 'cls', expected one of patch, cls_patch"),
        ({"mm_use_im_start_end": True}, "marks around an image"),
        ({"s2": True}, "one scale"),
        ({"image_aspect_ratio": "anyres"}, "has no image_grid_pinpoints"),
        (NEXT | {"mm_patch_merge_type": "flat"}, "image_aspect_ratio 'anyres' with mm_patch_merge_type 'flat'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "image_aspect_ratio 'pad' with mm_patch_merge_type 'spatial_unpad'"),
        ({"mm_vision_tower": "nowhere/at all"}, "'nowhere/at all' is no folder here.*--tower DIR"),
    ],
)
def test_what_the_stock_model_cannot_hold_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        converted(written(tmp_path, stock(), **changes))


def test_a_checkpoint_that_is_converted_already_is_refused(tmp_path):
    converted(written(tmp_path, stock()))
    with pytest.raises(ValueError, match="has no mm_vision_tower, mm_vision_select_layer, as every"):
        convert("llava", str(tmp_path / "converted"), tmp_path / "again")


def test_another_tower_than_clip_is_refused(tmp_path):
    source = written(tmp_path, stock())
    (tmp_path / "clip" / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
    with pytest.raises(ValueError, match="type 'siglip_vision_model', expected a CLIP vision model"):
        converted(source)


def test_the_tower_may_be_elsewhere(tmp_path):
    reference = stock()
    source = written(tmp_path, reference, mm_vision_tower="openai/clip-vit-large-patch14-336")
    model, processor = converted(source, tower=str(tmp_path / "clip"))
    assert_same_logits(model, reference, asked(processor, picture(1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.mm_projector.2.bias"), r"1 missing \(model\.mm_projector\.2\.bias\)"),
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"),
        (lambda w: w.update({"model.conv_4.weight": torch.ones(1)}), r"1 surplus \(model\.conv_4\.weight\)"),
        (lambda w: w.update({"model.image_newline": torch.ones(48)}), r"1 surplus \(model\.image_newline\)"),
        (lambda w: w.pop("model.embed_tokens.weight"), "has no model.embed_tokens.weight: it is part of a model"),
        (
            lambda w: w.update({"model.mm_projector.0.weight": torch.ones(48, 64)}),
            r"model\.mm_projector\.0\.weight is \(48, 64\), but .* it must be \(48, 32\)",
        ),
    ],
)
def test_keys_that_do_not_fit_are_named(tmp_path, change, message):
    reference = stock()
    weights = names_of_theirs(reference, tower=False)
    change(weights)
    config = config_of_theirs(reference, write_tower(tmp_path / "clip", reference))
    with pytest.raises(ValueError, match=message):
        converted(write_checkpoint(tmp_path / "original", config, weights))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "original"]


def test_a_tower_with_a_weight_too_few_is_named(tmp_path):
    reference = stock()
    weights = names_of_theirs(reference, tower=True)
    key = "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight"
    del weights[key]
    config = config_of_theirs(reference, write_tower(tmp_path / "clip", reference))
    with pytest.raises(ValueError, match=rf"1 missing \({key}\)"):
        converted(write_checkpoint(tmp_path / "original", config, weights))
