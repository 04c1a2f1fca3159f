"""Patches of composed photographs learn the word for what they show."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPooling

import mllm_vision as mv
from mllm_vision.recipes.object_words import (
    IGNORED,
    ObjectWords,
    PhotoPatches,
    nouns_of,
    patch_nouns,
    photo_patch_batch,
)

NOUNS = ["background", "star", "circle"]


def row(*things, side=100):
    return {"id": "train-0", "split": "train", "side": side, "objects": [{"noun": n, "box": b} for n, b in things]}


def test_a_patch_has_the_noun_of_the_box_whose_middle_it_is_in():
    found = patch_nouns(row(("star", [0, 0, 50, 50]), ("circle", [60, 60, 100, 100])), NOUNS, 10).view(10, 10)
    core, rim = found[1:4, 1:4], found[0, :5]
    assert (core == 1).all()
    assert (rim == IGNORED).all(), "the rim of a box is unsure"
    assert (found[7:9, 7:9] == 2).all()
    assert (found[:5, 6:] == 0).all()
    assert (found == 0).sum() == 100 - 25 - 16


def test_overlaps_and_nouns_that_are_not_taught_are_unsure():
    found = patch_nouns(row(("star", [0, 0, 60, 60]), ("circle", [20, 0, 100, 60])), NOUNS, 10).view(10, 10)
    assert (found[:6, 2:6] == IGNORED).all()
    assert (patch_nouns(row(("violin", [0, 0, 100, 100])), NOUNS, 4) == IGNORED).all()


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "images").mkdir()
    rows = [
        {**row(("star", [0, 0, 140, 70]), side=140), "id": "train-0"},
        {**row(("circle", [0, 0, 70, 140]), side=140), "id": "train-1"},
        {**row(("star", [0, 0, 140, 140]), side=140), "id": "test-0", "split": "test"},
    ]
    for i, each in enumerate(rows):
        Image.new("RGB", (140, 140), (90 * i, 20, 20)).save(tmp_path / "images" / f"{each['id']}.jpg")
    (tmp_path / "objects.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return tmp_path


def test_photographs_are_those_of_a_split(photos):
    assert nouns_of(photos) == ["background", "circle", "star"]
    _, processor = mv.load("tiny-llava-scenes")
    for limit, ids in ((None, ["train-0", "train-1"]), (1, ["train-0"]), (3, ["train-0", "train-1"])):
        rows = PhotoPatches(photos, "train", nouns_of(photos), processor, limit)
        assert [rows[i]["row_id"] for i in range(len(rows))] == ids
    assert len(PhotoPatches(photos, "test", nouns_of(photos), processor)) == 1
    with pytest.raises(ValueError, match="has no photographs of the split 'validation'; `mllm-vision photos` writes"):
        PhotoPatches(photos, "validation", nouns_of(photos), processor)


class Said(torch.nn.Module):
    """Stands for a host that says the given features."""

    def __init__(self, model, features):
        super().__init__()
        self.features, self.get_input_embeddings = features, model.get_input_embeddings
        self.config, self.model = model.config, model.model

    def get_image_features(self, **images):
        return BaseModelOutputWithPooling(pooler_output=list(self.features))


def test_the_loss_is_least_where_every_patch_is_the_word_for_what_it_shows():
    model, processor = mv.load("tiny-llava-scenes")
    words = ObjectWords(model, processor, NOUNS).words
    for i, noun in enumerate(NOUNS):
        ids = processor.tokenizer(f" {noun}", add_special_tokens=False)["input_ids"]
        assert torch.equal(words[i], model.get_input_embeddings().weight[ids].mean(0))
    targets = torch.tensor([[0, 1, 2, IGNORED]])
    right = torch.cat([words[:3], torch.randn(1, words.shape[1])])[None]
    out = ObjectWords(Said(model, right), processor, NOUNS)(nouns=targets)
    cosines = functional.normalize(words, dim=-1) @ functional.normalize(words, dim=-1).T
    expected = functional.cross_entropy(20 * cosines, torch.arange(3), weight=torch.tensor([0.1, 1, 1]))
    torch.testing.assert_close(out["loss"], expected)
    assert out["hits"].tolist() == [[[2, 2], [1, 1]]]
    longer = ObjectWords(Said(model, right * 2), processor, NOUNS)(nouns=targets)["loss"]
    torch.testing.assert_close(longer, expected + 1.0)  # as far from the words as these are long
    wrong = ObjectWords(Said(model, right[:, [0, 2, 1, 3]]), processor, NOUNS)(nouns=targets)
    assert wrong["hits"].tolist() == [[[0, 2], [1, 1]]]


def test_only_what_is_trained_gets_gradients(photos):
    model, processor = mv.load("tiny-llava-scenes")
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    nouns = nouns_of(photos)
    rows = PhotoPatches(photos, "train", nouns, processor)
    batch = photo_patch_batch([rows[0], rows[1]])
    assert batch.pop("row_ids") == ["train-0", "train-1"]
    ObjectWords(model, processor, nouns)(**batch)["loss"].backward()
    assert all(parameter.grad.any() for parameter in model.model.multi_modal_projector.parameters())
    assert all(p.grad is None for n, p in model.named_parameters() if "multi_modal_projector" not in n)


def test_a_checkpoint_holds_what_is_trained_and_not_the_language_model(tmp_path):
    model, processor = mv.load("tiny-llava-scenes")
    assert model.lm_head.weight is model.get_input_embeddings().weight  # which no file could hold twice
    words = ObjectWords(model, processor, NOUNS)
    save_file(words.state_dict(), tmp_path / "words.safetensors")
    parts = {name.partition(".")[0] for name in words.state_dict()}
    assert parts == {"tower", "projector"}
    assert words.projector is model.model.multi_modal_projector
