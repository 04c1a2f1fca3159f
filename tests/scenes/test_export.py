"""Exports can be read back by those they are made for."""

import json

import numpy as np
import pytest
from PIL import Image

from mllm_vision.scenes import caption, render, sample_scene
from mllm_vision.scenes.export import export_conversations, export_dataset, scene_questions


def test_a_datasets_directory_holds_the_scenes(tmp_path):
    from datasets import load_from_disk

    rows = load_from_disk(export_dataset(tmp_path / "scenes", "test", 3))
    assert len(rows) == 3
    for i, row in enumerate(rows):
        scene = sample_scene("test", i)
        assert np.array_equal(row["image"], render(scene))
        assert row["caption"] == caption(scene)
        assert row["questions"] == [vars(question) for question in scene_questions(scene)]
        assert json.loads(row["scene"]) == json.loads(json.dumps(scene.to_dict()))


def test_llava_conversations_name_the_pictures_beside_them(tmp_path):
    folder = export_conversations(tmp_path / "llava", "validation", 3)
    conversations = json.loads((folder / "conversations.json").read_text())
    assert [entry["id"] for entry in conversations] == [f"validation-{i:06d}" for i in range(3)]
    for i, entry in enumerate(conversations):
        scene = sample_scene("validation", i)
        assert np.array_equal(Image.open(folder / "images" / entry["image"]), render(scene))
        turns = entry["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert [turn["value"].startswith("<image>\n") for turn in turns] == [True] + [False] * (len(turns) - 1)
        assert turns[1]["value"] == caption(scene)
        asked = [(turns[k]["value"], turns[k + 1]["value"]) for k in range(2, len(turns), 2)]
        assert asked == [(question.text, question.answer) for question in scene_questions(scene)]


@pytest.mark.parametrize("export", [export_dataset, export_conversations])
def test_nothing_is_overwritten_unasked(tmp_path, export):
    folder = export(tmp_path / "scenes", "test", 1)
    with pytest.raises(FileExistsError, match="not empty; choose another folder, or replace it"):
        export(folder, "test", 1)
    (folder / "remains.txt").write_text("of the first export")
    export(folder, "test", 2, overwrite=True)
    assert not (folder / "remains.txt").exists()


def test_overwriting_removes_nothing_but_an_export(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not removed"):
        export_conversations(tmp_path, "test", 1, overwrite=True)
    assert (tmp_path / "precious.txt").read_text() == "mine"
