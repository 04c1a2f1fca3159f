"""The tokenizer, the processor and the chat template of the tiny model."""

import pytest
import torch
from transformers import AutoProcessor

from mllm_vision.recipes.tiny_model import build_processor, build_tokenizer
from mllm_vision.scenes import FAMILIES, caption, render, sample_scene
from mllm_vision.scenes.export import scene_questions


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize(
    "text",
    [
        "is there a star in the picture?",
        "what's the weather like in zürich, today?",
        "how many zebras, and why 1234?",
        "日本 ☃ (a snowman) & 50% more!",
    ],
)
def test_text_comes_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_case_and_white_space_are_folded(tokenizer):
    assert tokenizer("Is there\n a  STAR?")["input_ids"] == tokenizer("is there a star?")["input_ids"]


def test_scenes_are_spoken_of_in_whole_words(tokenizer):
    for i in range(100):
        scene = sample_scene("train", i)
        for text in [
            caption(scene),
            *(q.text for q in scene_questions(scene)),
            *(q.answer for q in scene_questions(scene)),
        ]:
            pieces = tokenizer.tokenize(text)
            words = text.replace(",", " ,").replace("?", " ?").replace(".", " .").split()
            plurals = sum(word.endswith("s") and word[:-1] not in "is doe" for word in words)
            assert len(pieces) <= len(words) + 2 * plurals, pieces
    assert len(FAMILIES) == 5


def test_the_processor_expands_the_picture_and_survives_a_round_trip(tmp_path):
    processor = build_processor(140, 14)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    content = [{"type": "image"}, {"type": "text", "text": "is there a star?"}]
    messages = [{"role": "user", "content": content}]
    prompt = loaded.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == "USER: <image>\nis there a star? ASSISTANT:"
    image = render(sample_scene("test", 0))
    first, second = (p(images=image, text=prompt, return_tensors="pt") for p in (processor, loaded))
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key])
    assert (second["input_ids"] == loaded.image_token_id).sum() == 100
    assert second["pixel_values"].shape == (1, 3, 140, 140)


def test_a_conversation_of_several_turns_is_laid_out_like_the_first():
    processor = build_processor(140, 14)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a star?"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "what color is it?"},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "USER: <image>\nis there a star? ASSISTANT: yes</s>USER: what color is it? ASSISTANT:"
    )


def test_batches_are_padded_on_the_left(tokenizer):
    batch = tokenizer(["is there a star?", "yes"], padding=True)
    assert batch["attention_mask"][1][:2] == [0, 0]
    assert batch["attention_mask"][1][-1] == 1
