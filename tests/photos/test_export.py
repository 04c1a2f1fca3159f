"""The folder that is written can be read by those that it is made for."""

import json
import random

import pytest
from PIL import Image

from mllm_vision.photos import Photo, compose, export_photos
from mllm_vision.photos.questions import CAPTION_PROMPTS
from tests.photos.conftest import SIDE

SIZES = {"train": 8, "validation": 3, "test": 5}


@pytest.fixture(scope="module")
def folder(cutouts, backgrounds, tmp_path_factory):
    return export_photos(tmp_path_factory.mktemp("made") / "photos", cutouts, [backgrounds], SIZES, side=SIDE)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_folder_comes_of_the_same_arguments(folder, cutouts, backgrounds, tmp_path):
    again = export_photos(tmp_path / "again", cutouts, [backgrounds], SIZES, side=SIDE)
    assert contents(again) == contents(folder)
    other = export_photos(tmp_path / "other", cutouts, [backgrounds], SIZES, side=SIDE, seed=1)
    assert contents(other).keys() == contents(folder).keys()
    assert read(other / "train.jsonl") != read(folder / "train.jsonl")


def test_it_holds_what_it_says(folder, material):
    assert sorted(path.name for path in folder.iterdir()) == [
        "captions.jsonl",
        "images",
        "objects.jsonl",
        "photos.json",
        "questions",
        "train.jsonl",
        "validation.jsonl",
    ]
    assert sorted(path.name for path in (folder / "questions").iterdir()) == ["test.jsonl", "validation.jsonl"]
    names = [f"{split}-{index:06d}" for split, n in SIZES.items() for index in range(n)]
    assert sorted(path.name for path in (folder / "images").iterdir()) == sorted(f"{name}.jpg" for name in names)
    manifest = json.loads((folder / "photos.json").read_text())
    assert manifest["sizes"] == SIZES
    assert (manifest["side"], manifest["seed"]) == (SIDE, 0)
    assert manifest["backgrounds"] == {
        "train": ["FallenLeaf", "Kay", "summer_1am"],
        "validation": ["ColdRipple"],
        "test": ["Kite", "Path"],
    }
    assert manifest["cutouts"]["test"]["dog"] == ["animals/mammals/dogs/dog"]
    assert [row["id"] for row in read(folder / "objects.jsonl")] == names
    for row in read(folder / "objects.jsonl"):
        photo, _ = compose(material, row["split"], row["index"])
        assert row == json.loads(json.dumps(photo.to_dict()))
        with Image.open(folder / "images" / f"{row['id']}.jpg") as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (SIDE, SIDE), "RGB")


def test_no_cutout_and_no_background_is_in_two_splits(folder):
    rows = read(folder / "objects.jsonl")
    for of in (lambda row: {thing["cutout"] for thing in row["objects"]}, lambda row: {row["background"]}):
        used = {split: set().union(*(of(row) for row in rows if row["split"] == split)) for split in SIZES}
        assert all(used.values())
        assert not used["train"] & used["validation"]
        assert not used["train"] & used["test"]
        assert not used["validation"] & used["test"]


def test_conversations_are_chat_messages_with_one_picture(folder, material, asker):
    import datasets

    for name, split, n in (("captions", "train", 8), ("train", "train", 8), ("validation", "validation", 3)):
        rows = read(folder / f"{name}.jsonl")
        assert len(rows) == n
        for index, row in enumerate(rows):
            photo, _ = compose(material, split, index)
            assert row.keys() == {"id", "images", "messages"}
            assert row["images"] == [f"images/{photo.name}.jpg"]
            messages = row["messages"]
            assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
            kinds = [[part["type"] for part in message["content"]] for message in messages]
            assert kinds == [["image", "text"], *[["text"]] * (len(messages) - 1)]
            turns = [message["content"][-1]["text"] for message in messages]
            rng = random.Random(f"ask-0-{photo.name}")
            caption = asker.caption_question(photo, rng) if split == "train" else None
            if name == "captions":
                assert row["id"] == f"{photo.name}-caption"
                assert turns == [caption.text, caption.answer]
                assert turns[0] in CAPTION_PROMPTS
            else:
                assert row["id"] == photo.name
                asked = asker.conversation(photo, rng)
                assert turns == [text for question in asked for text in (question.text, question.answer)]
        table = datasets.Dataset.from_list(rows)  # every row has the same columns, of the same types
        assert table[0]["messages"][0]["content"][1] == rows[0]["messages"][0]["content"][1]


def test_questions_are_a_row_each_with_the_picture_they_are_about(folder, material, asker):
    for split in ("validation", "test"):
        expected = []
        for index in range(SIZES[split]):
            photo, _ = compose(material, split, index)
            rng = random.Random(f"ask-0-{photo.name}")
            if split == "validation":
                asker.conversation(photo, rng)  # written before
            for number, question in enumerate(asker.examination(photo, rng)):
                row = {"id": f"{photo.name}-{number}", "image": f"{photo.name}.jpg", "question": question.text}
                expected.append(row | {"family": question.family, "kind": question.kind, "answer": question.answer})
        assert read(folder / "questions" / f"{split}.jsonl") == expected


def test_nothing_is_overwritten_unasked(cutouts, backgrounds, tmp_path):
    sizes = {"train": 1, "validation": 0, "test": 0}
    folder = export_photos(tmp_path / "photos", cutouts, [backgrounds], sizes, side=SIDE)
    with pytest.raises(FileExistsError, match="not empty; choose another folder, or replace it"):
        export_photos(folder, cutouts, [backgrounds], sizes, side=SIDE)
    (folder / "remains.txt").write_text("of the first export")
    export_photos(folder, cutouts, [backgrounds], sizes, side=SIDE, overwrite=True)
    assert not (folder / "remains.txt").exists()
    (folder / "photos.json").unlink()
    with pytest.raises(FileExistsError, match="holds something other than composed photographs and is not removed"):
        export_photos(folder, cutouts, [backgrounds], sizes, side=SIDE, overwrite=True)
    assert (folder / "train.jsonl").exists()


def test_a_broken_run_leaves_what_was_there(folder, cutouts, backgrounds, tmp_path, monkeypatch):
    sizes = {"train": 2, "validation": 0, "test": 0}
    whole = export_photos(tmp_path / "photos", cutouts, [backgrounds], sizes, side=SIDE)
    before = contents(whole)

    def fail(self, *args, **kwargs):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fail)
        with pytest.raises(OSError, match="the disk is full"):
            export_photos(whole, cutouts, [backgrounds], sizes, side=SIDE, overwrite=True)
    assert contents(whole) == before
    export_photos(whole, cutouts, [backgrounds], sizes, side=SIDE, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    assert contents(whole) == before


def test_photographs_too_small_to_tell_are_refused(cutouts, backgrounds, tmp_path):
    with pytest.raises(
        ValueError, match="side must be at least 112 pixels so that a cut-out can be recognised, got 56"
    ):
        export_photos(tmp_path / "photos", cutouts, [backgrounds], SIZES, side=56)
    assert not (tmp_path / "photos").exists()


def test_the_record_names_every_field_of_a_photograph(folder):
    assert read(folder / "objects.jsonl")[0].keys() == {"id", *Photo.__dataclass_fields__}
