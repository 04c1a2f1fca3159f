"""What the training stages feed to the model."""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

import mllm_vision as mv
from mllm_vision.recipes.objectives import (
    HITS,
    IGNORED,
    NOUNS,
    WORD_GROUPS,
    AnswerCollator,
    AnswerScenes,
    PatchWordCollator,
    PatchWords,
    PatchWordScenes,
    patch_words,
    token_side,
)
from mllm_vision.recipes.tiny_model import build_model, build_processor
from mllm_vision.recipes.uhd_tower import UHDTowerSpec, with_uhd_tower
from mllm_vision.scenes.draw import TEXTS, Background, PrintedText, Scene, Thing, render, sample_scene

SIDE, PATCH = 70, 14


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of a toy with CLIP's tower, and of the same with a ViT-UHD of half the patches, merged once."""
    folder = tmp_path_factory.mktemp("toys")
    processor = build_processor(SIDE, PATCH)
    torch.manual_seed(0)
    vision = dict(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    text = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True
    )
    build_model(vision, text, processor).save_pretrained(folder / "clip")
    processor.save_pretrained(folder / "clip")
    spec = UHDTowerSpec(base=str(folder / "clip"), patch_size=PATCH // 2, merger_layers=[0])
    for part in with_uhd_tower(spec, SIDE):
        part.save_pretrained(folder / "uhd")
    return folder


@pytest.fixture(params=["clip", "uhd"])
def toy(checkpoints, request):
    return mv.load(checkpoints / request.param)


@pytest.fixture
def model(toy):
    return toy[0]


@pytest.fixture
def processor(toy):
    return toy[1]


def test_packed_questions_are_seen_as_if_asked_alone(model, processor):
    turns = {"caption": 1, "existence": 2, "count": 2, "colour": 1}
    rows = [AnswerScenes("train", 3, 2, SIDE, turns)[i] for i in range(2)]
    batch = AnswerCollator(processor)(rows)
    assert (batch["input_ids"] == processor.tokenizer.pad_token_id).any(), "equal lengths: padding is not tested"
    with torch.no_grad():
        packed = model(**batch).logits
    for b, row in enumerate(rows):
        answered = (batch["labels"][b] != IGNORED).nonzero()[:, 0]
        start = 0
        for question in row["questions"]:
            # The reference goes through the chat template and the stock processor, as at inference.
            content = [{"type": "image"}, {"type": "text", "text": question.text}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            alone = processor(images=row["image"], text=f"{prompt} {question.answer}</s>", return_tensors="pt")
            n = len(processor.tokenizer(question.answer, add_special_tokens=False)["input_ids"]) + 1
            positions = answered[start : start + n]
            start += n
            assert torch.equal(batch["labels"][b, positions], alone["input_ids"][0, -n:])
            with torch.no_grad():
                expected = model(**alone).logits[0, -n - 1 : -1]
            torch.testing.assert_close(packed[b, positions - 1], expected)
        assert start == len(answered)


def test_no_answer_can_be_read_from_another_question(model, processor):
    row = AnswerScenes("train", 3, 1, SIDE, {"existence": 3})[0]
    batch = AnswerCollator(processor)([row])
    with torch.no_grad():
        before = model(**batch).logits
    first_answer = (batch["labels"][0] != IGNORED).nonzero()[0, 0]
    batch["input_ids"][0, first_answer] += 1
    with torch.no_grad():
        after = model(**batch).logits
    changed = (before != after).any(-1)[0].nonzero()[:, 0]
    assert changed.tolist() == [first_answer, first_answer + 1]


def test_words_under_the_patches_of_a_picture_that_can_be_checked_by_eye():
    grey = Background("plain", (150, 150, 150), (150, 150, 150), 0)
    # A square over the 2 x 2 patches in one corner, a circle over the 3 x 3 in the other.
    square = Thing("square", "red", "small", "dotted", 14, 14, 28)
    circle = Thing("circle", "blue", "large", "plain", 49, 49, 42)
    scene = Scene("train", 0, SIDE, grey, (square, circle), None)
    words = patch_words(scene, PATCH)
    nouns = np.array([NOUNS[i] for i in words["noun"]]).reshape(5, 5)
    _, s, c = "background", "square", "circle"
    assert nouns.tolist() == [[s, s, _, _, _], [s, s, _, _, _], [_, _, c, c, c], [_, _, c, c, c], [_, _, c, c, c]]
    colours = words["colour"].reshape(5, 5)
    assert (colours[:2, :2] == WORD_GROUPS["colour"].index("red")).all() and (colours[0, 2:] == IGNORED).all()
    assert (words["texture"].reshape(5, 5)[:2, :2] == WORD_GROUPS["texture"].index("dotted")).all()
    middles = words["middle"].reshape(5, 5)
    assert middles.nonzero()[0].tolist() == [1, 3] and middles.nonzero()[1].tolist() == [1, 3]
    assert words["centres"].reshape(5, 5, 2)[4, 4].tolist() == pytest.approx([0.7, 0.7])


def test_printed_text_is_labelled_where_its_ink_is():
    grey = Background("plain", (150, 150, 150), (150, 150, 150), 0)
    thing = Thing("circle", "blue", "small", "plain", 56, 56, 26)
    text = PrintedText("zoo", "black", 26, 3, 3)
    scene = Scene("train", 0, SIDE, grey, (thing,), text)
    plain = Scene("train", 0, SIDE, grey, (thing,), None)
    ink = (np.asarray(render(scene)) != np.asarray(render(plain))).any(-1)
    labelled = (patch_words(scene, PATCH)["noun"] == NOUNS.index("zoo")).reshape(5, 5)
    inked = ink.reshape(5, PATCH, 5, PATCH).mean((1, 3))
    assert labelled[inked > 0.15].all() and not labelled[inked == 0].any()


def test_patch_word_loss_falls_on_one_batch_and_reaches_every_part(model, processor, request):
    rows = [PatchWordScenes("train", 0, 4, SIDE, PATCH)[i] for i in range(4)]
    batch = PatchWordCollator(processor)(rows)
    objective = PatchWords(model, processor, 100.0)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = objective(**batch)["loss"]
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    # Without CLS nothing reads the last layer, which is behind the one that the host reads.
    unread = () if "clip" in request.node.name else ("tower.layers.2.",)
    missing = [name for name, parameter in objective.named_parameters() if parameter.grad is None]
    assert all(name.startswith(unread) for name in missing) and bool(missing) == bool(unread)


def test_hits_count_only_patches_that_carry_something(model, processor):
    scenes = (sample_scene("train", i, side=SIDE) for i in range(300))
    printed = next(scene.index for scene in scenes if scene.text and scene.text.text == TEXTS[0])
    rows = [PatchWordScenes("train", i, 1, SIDE, PATCH)[0] for i in (printed, 0)]
    batch = PatchWordCollator(processor)(rows)
    hits = PatchWords(model, processor, 100.0)(**batch)["hits"]
    for b, row in enumerate(rows):
        for g, group in enumerate(HITS):
            if group == "text":
                counted = np.isin(row["noun"], [NOUNS.index(text) for text in TEXTS])
            else:
                counted = (row[group] > 0) if group in ("noun", "middle") else (row[group] != IGNORED)
            assert hits[b, g, 1] == counted.sum()
            assert 0 <= hits[b, g, 0] <= hits[b, g, 1]


@pytest.mark.parametrize(("side", "expected"), [(SIDE, (PATCH, PATCH)), (2 * SIDE, (28, 20))])
def test_the_square_behind_a_token_is_told_from_the_processor(checkpoints, side, expected):
    # Of the larger picture CLIP's processor makes 5 x 5 tokens again, that of the ViT-UHD as many as it may, 7 x 7.
    clip, uhd = (AutoProcessor.from_pretrained(checkpoints / name) for name in ("clip", "uhd"))
    assert (token_side(clip, side), token_side(uhd, side)) == expected


def test_words_are_said_of_what_the_host_gives_the_language_model(model, processor):
    rows = [PatchWordScenes("train", i, 1, SIDE, PATCH)[0] for i in range(2)]
    batch, objective = PatchWordCollator(processor)(rows), PatchWords(model, processor, 1.0)
    images = {name: value for name, value in batch.items() if name in ("pixel_values", "image_sizes")}
    with torch.no_grad():
        features = torch.stack(list(model.model.get_image_features(**images, return_dict=True).pooler_output))
        said = (features @ objective.embeddings(objective.word_ids["noun"]).T).argmax(-1)
        hits = objective(**{**batch, "noun": said})["hits"]
    assert torch.equal(hits[:, 0, 0], hits[:, 0, 1])


def test_a_pack_of_pictures_is_taught_as_each_alone(model, processor):
    rows = [PatchWordScenes("train", 0, 2, SIDE, PATCH)[i] for i in range(2)]
    objective, collate = PatchWords(model, processor, 1.0), PatchWordCollator(processor)
    with torch.no_grad():
        together = objective(**collate(rows))["hits"]
        alone = torch.cat([objective(**collate([row]))["hits"] for row in rows])
    assert torch.equal(together, alone)
    first, *_ = collate(rows).values()
    assert len(first) == 2  # by which the Trainer counts the pictures of a batch


def test_scenes_of_both_stages_are_printed_as_small_as_asked():
    words = PatchWordScenes("train", 4, 4, 280, 28, 0.5)
    answers = AnswerScenes("train", 4, 4, 280, {"count": 1}, 0.5)
    for i in range(4):
        expected = np.asarray(render(sample_scene("train", 4 + i, side=280, text_scale=0.5)))
        np.testing.assert_array_equal(np.asarray(words[i]["image"]), expected)
        np.testing.assert_array_equal(np.asarray(answers[i]["image"]), expected)
