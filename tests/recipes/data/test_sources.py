import io
import json

import datasets
import pytest

from mllm_vision.recipes.data import BadRow, DataSource, training_rows
from mllm_vision.recipes.data.sources import Table, stream
from tests.hosts import HOSTS, picture
from tests.recipes.data.written import processor_of, said, write

PROCESSOR = processor_of(HOSTS[0])


def _row(i, **columns):
    turns = [{"type": "image"}, {"type": "text", "text": f"What is in picture {i}?"}]
    answer = [{"type": "text", "text": f"number {i}"}]
    messages = [{"role": "user", "content": turns}, {"role": "assistant", "content": answer}]
    return {"id": f"r{i}", "messages": messages, **columns}


def _pictured(tmp_path, *, single=False, encoded=False):
    """Five rows with an Image feature: a column of one picture or of lists, of paths or of bytes."""
    write(tmp_path, [])
    rows = []
    for i in range(5):
        shown = str(tmp_path / f"{i % 3}.png")
        if encoded:
            file = io.BytesIO()
            picture(i).save(file, "PNG")
            shown = {"bytes": file.getvalue() if i != 3 else file.getvalue()[:200], "path": None}
        rows.append(_row(i, **({"image": shown} if single else {"images": [shown]})))
    feature = datasets.Image() if single else datasets.List(datasets.Image())
    name = "image" if single else "images"
    table = datasets.Dataset.from_list(rows)
    return table.cast(datasets.Features({**table.features, name: feature}))


def _saved(table, tmp_path, kind):
    path = tmp_path / kind
    if kind == "saved":
        table.save_to_disk(path)
    elif kind == "splits":
        datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(path)
    elif kind == "rows.parquet":
        table.to_parquet(path)
    else:
        path.mkdir()
        table.to_parquet(path / "train-00000-of-00001.parquet")
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["saved", "splits", "rows.parquet", "folder"])
def test_messages_are_read_from_whatever_datasets_reads(tmp_path, kind, streaming):
    path = _saved(_pictured(tmp_path), tmp_path, kind)
    rows = training_rows([DataSource(format="messages", path=path, streaming=streaming)], PROCESSOR, max_length=300)
    got = sorted((row for row in rows), key=lambda row: row["row_id"])
    assert [row["row_id"] for row in got] == [f"r{i}" for i in range(5)]
    learnt = [PROCESSOR.tokenizer.decode(row["labels"][row["labels"] != -100]) for row in got]
    assert learnt == [f" number {i}</s>" for i in range(5)]
    assert all(row["pixel_values"].shape == (1, 3, 84, 84) for row in got)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_a_truncated_picture_in_a_table_is_the_fault_of_its_row(tmp_path, single, streaming):
    path = _saved(_pictured(tmp_path, single=single, encoded=True), tmp_path, "rows.parquet")
    source = DataSource(format="messages", path=path, streaming=streaming)
    rows = training_rows([source], PROCESSOR, max_length=300)
    with pytest.raises(BadRow, match=r"row r3: picture of 200 bytes is damaged or cut off"):
        list(rows)
    rows = training_rows([source], PROCESSOR, max_length=300, bad_rows="skip")
    assert {row["row_id"] for row in rows} == {"r0", "r1", "r2", "r4"}
    assert rows.skipped == 1


def test_sizes_of_a_table_leave_its_pictures_alone(tmp_path):
    table = Table(DataSource(format="messages", path=_saved(_pictured(tmp_path, encoded=True), tmp_path, "saved")))
    assert table.sizes.tolist() == [[1, len("What is in picture 0?number 0")]] * 5


def test_lines_may_mix_strings_with_parts_and_lack_keys(tmp_path):
    """No Arrow table holds these rows as they are."""
    turns = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "a dog"}]
    path = write(tmp_path, [_row(0, image="0.png"), {"messages": turns, "images": ["1.png"]}], "rows.jsonl")
    rows = training_rows([DataSource(format="messages", path=path)], PROCESSOR, max_length=300)
    learnt = [PROCESSOR.tokenizer.decode(row["labels"][row["labels"] != -100]) for row in rows]
    assert learnt == [" number 0</s>", " a dog</s>"]
    assert rows[1]["row_id"] == f"{path}:1"


def test_pictures_are_looked_for_in_the_folder_that_is_named(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    row = {"image": "0.png", "conversations": said("<image>What?", "a dog")}
    write(tmp_path / "elsewhere", [])
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    source = {"format": "conversations", "path": str(tmp_path / "rows.json")}
    named = DataSource(**source, images=str(tmp_path / "elsewhere"))
    assert "pixel_values" in training_rows([named], PROCESSOR, max_length=300)[0]
    with pytest.raises(BadRow, match=r"0\.png is no file"):
        training_rows([DataSource(**source)], PROCESSOR, max_length=300)[0]


@pytest.mark.parametrize("name", ["rows.json", "rows.parquet"])
def test_a_limit_takes_the_first_rows(tmp_path, name):
    write(tmp_path, [_row(i, image="0.png") for i in range(5)])
    path = str(tmp_path / name) if name.endswith("json") else _saved(_pictured(tmp_path), tmp_path, name)
    for limit, expected in ((2, ["r0", "r1"]), (9, [f"r{i}" for i in range(5)])):
        table = Table(DataSource(format="messages", path=path, limit=limit))
        assert [table.row(i)["id"] for i in range(len(table))] == expected
        assert len(table.sizes) == len(expected)
        streamed = DataSource(format="messages", path=path, limit=limit, streaming=True)
        assert [row["id"] for _, row in stream(streamed)] == expected


def test_rows_without_messages_are_broken_one_by_one(tmp_path):
    datasets.Dataset.from_list([{"text": "hello"}]).to_parquet(tmp_path / "rows.parquet")
    source = DataSource(format="messages", path=str(tmp_path / "rows.parquet"))
    rows = training_rows([source], PROCESSOR, max_length=300)
    assert rows.sizes().tolist() == [[0, 0]]
    with pytest.raises(BadRow, match="'messages' must be a list of turns, got None"):
        rows[0]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"weight": 0.0}, "weight must be above 0, got 0.0"),
        ({"weight": float("inf")}, "weight must be above 0, got inf"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"format": "sharegpt"}, "format must be one of 'conversations', 'messages', got 'sharegpt'"),
        ({"path": "a/hub-id"}, "conversations must be a .json or .jsonl file, got a/hub-id"),
        ({"folder": "x"}, "DataSource has no field folder"),
    ],
)
def test_a_source_says_at_once_what_is_wrong_with_it(fields, says):
    with pytest.raises(ValueError, match=says):
        DataSource(**{"format": "conversations", "path": "rows.json", **fields})


@pytest.mark.parametrize("path", ["gone.jsonl", "gone.parquet"])
def test_a_file_that_there_is_not_is_named(path):
    with pytest.raises(FileNotFoundError, match=f"{path} is no file; check the path"):
        Table(DataSource(format="messages", path=path))


def test_a_file_broken_behind_its_first_row_is_named_with_the_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n{"id": ')
    with pytest.raises(ValueError, match=r"rows.jsonl is no JSON array .* at character 17; mend the file"):
        Table(DataSource(format="messages", path=str(path)))


def test_a_file_of_another_kind_is_not_asked_of_the_hub(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"rows.csv is none of .json, .jsonl, .parquet, .arrow; save its rows as one"):
        Table(DataSource(format="messages", path=str(tmp_path / "rows.csv")))


def test_a_split_that_there_is_not_and_an_empty_file_are_errors(tmp_path):
    path = _saved(_pictured(tmp_path), tmp_path, "splits")
    with pytest.raises(ValueError, match="has no split 'dev'; it has train, test"):
        Table(DataSource(format="messages", path=path, split="dev"))
    assert len(Table(DataSource(format="messages", path=path, split="test"))) == 1
    with pytest.raises(ValueError, match=r"rows.json has no rows"):
        Table(DataSource(format="conversations", path=write(tmp_path, [])))
