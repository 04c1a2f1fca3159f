import json
import tracemalloc

import pytest

from mllm_vision.recipes.data import json_objects as module
from mllm_vision.recipes.data.json_objects import json_objects

ROWS = [{"id": i, "text": 'a "quoted" {brace] ' + "ä€" * i} for i in range(40)]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_and_lines_give_the_same_objects_wherever_chunks_end(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    (tmp_path / "array.json").write_text(json.dumps(ROWS, indent=indent, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text("\n\n".join(map(json.dumps, ROWS)) + "\n", encoding="utf-8")
    assert list(json_objects(tmp_path / "array.json")) == ROWS
    assert list(json_objects(tmp_path / "lines.jsonl")) == ROWS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"a": 1}, {"b": ', "no JSON array of objects and no JSON lines: Expecting value at character 17"),
        ('[{"a": 1} oops]', "at character 10"),
        ('[{"a": 1}, 5]', "has 5 at character 11 where a row"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path, text, says):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        list(json_objects(path))
    assert str(path) in str(error.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes("[]".encode("utf-16"))
    with pytest.raises(ValueError, match=r"rows.json is not text in UTF-8: .* position 0"):
        list(json_objects(path))


def test_what_never_ends_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 1000)
    monkeypatch.setattr(module, "_CHUNK", 100)
    path = tmp_path / "endless.json"
    path.write_text('[{"a": "' + "x" * 100_000)
    objects = json_objects(path)
    with pytest.raises(ValueError, match="Unterminated string"):
        next(objects)
    assert list(objects) == []


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 1 << 12)
    peaks = []
    for rows in (200, 20_000):
        path = tmp_path / f"{rows}.json"
        path.write_text(json.dumps([{"id": i, "text": "x" * 60} for i in range(rows)]))
        tracemalloc.start()
        assert sum(1 for _ in json_objects(path)) == rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
