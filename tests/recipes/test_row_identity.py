"""Rows are known again as long as nothing that they depend on has changed."""

import json
import os
from copy import deepcopy

import datasets
import pytest
from PIL import Image

from mllm_vision.recipes import row_identity
from mllm_vision.recipes.data import DataSource, training_rows
from mllm_vision.recipes.object_words import PhotoPatches, nouns_of
from mllm_vision.recipes.row_identity import identity_of
from tests.hosts import HOSTS, picture
from tests.recipes.data.written import ROWS, processor_of, said, write

PROCESSOR = processor_of(HOSTS[0])
ODD = {"id": "odd", "image": "none\0.png", "conversations": said("<image>\nWhat is it?", "nothing")}
BAD = {"id": "bad", "conversations": said("<image>\nWhere is the picture?", "gone")}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def identity(folder, rows=(*ROWS, ODD, BAD), processor=PROCESSOR, weight=1.0, limit=None, **options):
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    source = DataSource(format="conversations", path=str(path), weight=weight, limit=limit)
    options = {"max_length": 300, "bad_rows": "skip", **options}
    return identity_of(training_rows([source], processor, **options))


def test_rows_are_known_again_without_a_picture_being_opened(tmp_path, monkeypatch):
    write(tmp_path, [])
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *args, **kwargs: 1 / 0)
        found = identity(tmp_path)
        assert found == identity(tmp_path)
    assert found.pictures == 4, "those of the good rows, and one that nobody finds"
    assert identity(tmp_path, [*ROWS, *ROWS]).pictures == 3


def test_whatever_changes_makes_other_rows_of_them(tmp_path, monkeypatch):
    write(tmp_path, [])
    seen = [identity(tmp_path).digest]

    def other(*args, **kwargs):
        seen.append(identity(tmp_path, *args, **kwargs).digest)

    other([*ROWS[:2], {**ROWS[2], "id": "named"}])
    other([*ROWS[:2], {"conversations": said("Hello", "Hi there!")}])
    other([{**ROWS[0], "image": "1.png"}, *ROWS[1:]])
    other([*ROWS, {**BAD, "conversations": said("Where?")}])
    other(ROWS[::-1])
    other(weight=2.0)
    other(limit=3)
    other(max_length=299)
    other(bad_rows="fail")
    template = deepcopy(PROCESSOR)
    template.chat_template += " "
    other(processor=template)
    pixels = deepcopy(PROCESSOR)
    pixels.image_processor.image_mean = [0.5, 0.5, 0.5]
    other(processor=pixels)
    words = deepcopy(PROCESSOR)
    words.tokenizer.add_tokens(["another"])
    other(processor=words)
    monkeypatch.setattr(row_identity.mv, "__version__", "another")
    other()
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    stat = (tmp_path / "0.png").stat()
    os.utime(tmp_path / "0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    other()
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes() + b"more")
    os.utime(tmp_path / "0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other()
    (tmp_path / "0.png").unlink()
    other()
    assert len(set(seen)) == len(seen)
    picture(0, 84, 84).save(tmp_path / "0.png")
    os.utime(tmp_path / "0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity(tmp_path).digest == seen[0]


def test_pictures_in_a_table_are_known_by_their_bytes_and_on_the_web_by_their_address(tmp_path):
    def found(*shown):
        rows = [{"messages": _asked(len(shown)), "images": [{"bytes": b, "path": p} for b, p in shown]}]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
        source = DataSource(format="messages", path=str(tmp_path / "rows.parquet"))
        return identity_of(training_rows([source], PROCESSOR, max_length=300))

    one, other, address = (b"one", None), (b"other", None), (None, "https://nowhere.example/a.png")
    assert found(one, one, other, address) == found(one, one, other, address)
    assert found(one, one, other, address).pictures == 3
    assert len({found(*shown).digest for shown in ([one, other], [other, one], [one, one], [one, address])}) == 4


def _asked(pictures):
    return [{"role": "user", "content": "<image>" * pictures + "What?"}, {"role": "assistant", "content": "This."}]


def test_photographs_are_known_by_their_files_and_what_lies_in_them(tmp_path):
    (tmp_path / "images").mkdir()
    things = [{"noun": "star", "box": [0, 0, 70, 70]}]
    rows = [{"id": f"train-{i}", "split": "train", "side": 84, "objects": things} for i in range(3)]
    for row in rows:
        Image.new("RGB", (84, 84)).save(tmp_path / "images" / f"{row['id']}.jpg")

    def found(rows=rows, nouns=None, limit=None):
        (tmp_path / "objects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return identity_of(PhotoPatches(tmp_path, "train", nouns or nouns_of(tmp_path), PROCESSOR, limit))

    first = found()
    assert first == found() and first.pictures == 3
    moved = [*rows[:2], {**rows[2], "objects": [{"noun": "star", "box": [0, 0, 84, 70]}]}]
    seen = [first, found(moved), found(nouns=["star", "background"]), found(limit=2)]
    os.utime(tmp_path / "images" / "train-1.jpg", ns=(0, 0))
    seen.append(found())
    assert len({each.digest for each in seen}) == len(seen) and found(limit=2).pictures == 2


def test_other_rows_are_refused():
    with pytest.raises(TypeError, match="nobody knows what list are known by"):
        identity_of([])
