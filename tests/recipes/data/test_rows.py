import json
import logging
import pickle
from collections import Counter

import datasets
import numpy as np
import pytest
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import IterableDatasetShard as TrainerShard

from mllm_vision.recipes.data import BadRow, ChatCollator, DataSource, StreamedRows, TrainingRows, training_rows
from mllm_vision.recipes.data import rows as module
from mllm_vision.recipes.data.rows import PICTURE_LENGTH
from tests.hosts import HOSTS, picture
from tests.recipes.data.written import ROWS, processor_of, said, write

PROCESSOR = processor_of(HOSTS[0])
GOOD = {"id": "good", "image": "0.png", "conversations": said("<image>\nWhat?", "a dog")}
BROKEN = {
    "missing picture": ({**GOOD, "image": "gone.png"}, "gone.png is no file"),
    "truncated picture": ({**GOOD, "image": "cut.png"}, "damaged or cut off"),
    "no mark": ({**GOOD, "conversations": said("What?", "a dog")}, "no <image> mark for 1 picture"),
    "two marks": ({**GOOD, "conversations": said("<image><image>", "a dog")}, "2 <image> marks for 1 picture"),
    "no picture": ({"conversations": said("<image>What?", "a dog")}, "1 <image> mark for 0 pictures"),
    "empty answer": ({**GOOD, "conversations": said("<image>What?", "")}, "an answer is empty"),
    "roles": ({**GOOD, "conversations": said("<image>What?", "a dog")[::-1]}, "questions and answers in turn"),
    "no answer": ({**GOOD, "conversations": said("<image>What?")}, "end with an answer"),
    "too long": ({**GOOD, "conversations": said("<image>What?", "x" * 400)}, "more than max_length=300"),
    "no turns": ({}, "must be a list of turns"),
}


def _texts(count, prefix=""):
    return [{"id": f"{prefix}{i}", "conversations": said("Say", f"word {i}")} for i in range(count)]


def _rows(path, bad_rows="fail", seed=0, **source):
    sources = [DataSource(format="conversations", path=path, **source)]
    return training_rows(sources, PROCESSOR, max_length=300, bad_rows=bad_rows, seed=seed)


def _ids(loader):
    return [row_id for batch in loader for row_id in batch["row_ids"]]


@pytest.fixture
def cut(tmp_path):
    picture(3, 200, 200).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_is_an_error_with_its_id_or_is_skipped_and_logged_once(kind, streaming, tmp_path, caplog):
    broken, says = BROKEN[kind]
    path = write(tmp_path, [{**broken, "id": "bad"}, *_texts(1), {**GOOD, "id": 1}])
    rows = _rows(path, streaming=streaming)
    with pytest.raises(BadRow, match=f"row bad: .*{says}"):
        _ = list(rows) if streaming else rows[0]

    rows = _rows(path, "skip", streaming=streaming)
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        got = [row["row_id"] for row in rows]
        again = [row["row_id"] for row in rows]
    assert rows.skipped == (2 if streaming else 1)  # a stream knows no row again
    if streaming:
        assert sorted(got) == sorted(again) == ["0", "1"]
    else:
        shows_picture = kind != "no turns" and kind != "no mark"
        assert got == again == ["1" if shows_picture else "0", "0", "1"]
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == rows.skipped
    assert all(line.startswith("row bad: ") and says in line and line.endswith("; skipped") for line in warned)


def test_where_no_good_row_is_left_the_data_are_refused(tmp_path):
    rows = _rows(write(tmp_path, [BROKEN["no picture"][0]] * 3), "skip")
    with pytest.raises(ValueError, match="no good row left"):
        rows[1]
    assert rows.skipped == 3


def test_another_kind_stands_in_where_none_of_the_same_is_good(tmp_path):
    rows = _rows(write(tmp_path, [BROKEN["missing picture"][0], *_texts(2)]), "skip")
    assert rows[0]["row_id"] == "0"


def test_rows_are_found_by_number_and_no_other(tmp_path):
    rows = _rows(write(tmp_path, ROWS))
    assert len(rows) == len(list(rows)) == 3
    for number in (-1, 3):
        with pytest.raises(IndexError, match=f"there are 3 rows, got number {number}"):
            rows[number]


@pytest.mark.parametrize("weight", [0.1, 0.5, 1, 1.3, 2, 3.75])
def test_a_weight_says_exactly_how_often_rows_are_seen(weight, tmp_path):
    one, other = write(tmp_path, _texts(20, "a"), "a.json"), write(tmp_path, _texts(7, "b"), "b.jsonl")
    sources = [
        DataSource(format="conversations", path=one, weight=weight),
        DataSource(format="conversations", path=other),
    ]
    rows = training_rows(sources, PROCESSOR, max_length=300)
    seen = Counter(rows[i]["row_id"] for i in range(len(rows)))
    assert len(rows) == round(20 * weight) + 7
    assert all(seen[f"b{i}"] == 1 for i in range(7))
    assert all(seen[f"a{i}"] in (int(weight), int(weight) + (weight % 1 > 0)) for i in range(20))
    if weight == 0.5:
        assert [f"a{i}" for i in range(20) if seen[f"a{i}"]] == [f"a{i}" for i in range(0, 20, 2)]


def test_sizes_are_told_without_opening_a_picture(tmp_path):
    path = write(tmp_path, [*ROWS, {"id": "broken"}])
    for file in tmp_path.glob("*.png"):
        file.unlink()
    sources = [DataSource(format="conversations", path=path, weight=1.5)]
    sizes = training_rows(sources, PROCESSOR, max_length=300).sizes()
    characters = [sum(len(turn["value"]) for turn in row["conversations"]) for row in ROWS] + [0]
    once = [[n, n * PICTURE_LENGTH + c // 4] for n, c in zip((1, 2, 0, 0), characters, strict=True)]
    assert sizes.tolist() == [*once, once[0], once[2]]


def test_a_file_that_changed_is_read_anew(tmp_path):
    assert len(_rows(write(tmp_path, _texts(3)))) == 3
    assert len(_rows(write(tmp_path, _texts(5)))) == 5


def test_rows_stay_on_disk(tmp_path):
    rows = _rows(write(tmp_path, _texts(2000)))
    (file,) = rows.tables[0]._table.cache_files
    assert "cache" in file["filename"]
    assert isinstance(rows.tables[0]._table.data, datasets.table.MemoryMappedTable)
    assert len(pickle.dumps(rows.tables[0])) < 20_000  # what a worker is sent


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_share_the_rows_and_count_what_they_skip(tmp_path, streaming):
    path = write(tmp_path, [*_texts(9), {"id": "bad"}, GOOD])
    rows = _rows(path, "skip", streaming=streaming)
    loader = DataLoader(rows, batch_size=3, num_workers=2, collate_fn=ChatCollator(PROCESSOR))
    stand_in = [] if streaming else ["0"]
    assert sorted(_ids(loader)) == sorted([*(str(i) for i in range(9)), "good", *stand_in])
    assert rows.skipped == 1


def test_a_worker_fails_with_the_row_that_is_bad(tmp_path):
    rows = _rows(write(tmp_path, [{"id": "bad"}]))
    with pytest.raises(BadRow, match=r"^row bad: 'conversations' must be a list of turns, got None$"):
        list(DataLoader(rows, num_workers=1, collate_fn=ChatCollator(PROCESSOR)))


@pytest.mark.parametrize("shard", [IterableDatasetShard, TrainerShard])
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_of_a_stream_see_different_rows(tmp_path, shard, workers):
    path = write(tmp_path, _texts(16))
    seen = []
    for process in range(2):
        shards = shard(_rows(path, streaming=True), batch_size=2, num_processes=2, process_index=process)
        seen.append(_ids(DataLoader(shards, batch_size=2, num_workers=workers, collate_fn=ChatCollator(PROCESSOR))))
    assert len(seen[0]) == len(seen[1]) == 8
    assert sorted(seen[0] + seen[1]) == sorted(str(i) for i in range(16))


def test_the_order_of_a_stream_follows_seed_and_epoch(tmp_path):
    path = write(tmp_path, _texts(30))

    def order(seed, epoch):
        rows = _rows(path, streaming=True, seed=seed)
        rows.set_epoch(epoch)
        return tuple(row["row_id"] for row in rows)

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert len(set(orders)) == 3
    assert all(sorted(map(int, each)) == list(range(30)) for each in orders)
    assert order(0, 1) == orders[1]


def test_a_stream_holds_no_more_than_its_buffer(monkeypatch):
    monkeypatch.setattr(module, "_SHUFFLED", 4)
    read = []

    def numbers():
        for number in range(20):
            read.append(number)
            yield number

    got = []
    for number in module._shuffled(numbers(), "seed"):
        got.append(number)
        assert len(read) - len(got) <= 4
    assert sorted(got) == list(range(20)) != got


def test_streams_are_drawn_by_their_weights_until_all_are_at_their_end(tmp_path):
    sources = [
        DataSource(
            format="conversations", path=write(tmp_path, _texts(600, "a"), "a.json"), streaming=True, weight=3.0
        ),
        DataSource(format="conversations", path=write(tmp_path, _texts(400, "b"), "b.json"), streaming=True),
    ]
    rows = training_rows(sources, PROCESSOR, max_length=300)
    drawn = [source.row_id(row, number) for source, number, row in rows._mixed()]
    assert sorted(drawn) == sorted([*(f"a{i}" for i in range(600)), *(f"b{i}" for i in range(400))])
    of_first = sum(row_id.startswith("a") for row_id in drawn[:400])
    assert 270 < of_first < 330  # 300, of standard deviation 9
    assert type(rows) is StreamedRows


def test_sources_that_cannot_be_trained_on_are_refused(tmp_path):
    path = write(tmp_path, _texts(3))
    table, streamed = (DataSource(format="conversations", path=path, streaming=s) for s in (False, True))
    for sources, bad_rows, says in [
        ([], "fail", "no source of data"),
        ([table, streamed], "fail", "some sources are streamed and some are not"),
        ([table], "drop", "bad_rows must be 'fail' or 'skip', got 'drop'"),
        ([DataSource(format="conversations", path=path, weight=0.1)], "fail", "leave no row"),
    ]:
        with pytest.raises(ValueError, match=says):
            training_rows(sources, PROCESSOR, max_length=300, bad_rows=bad_rows)
    assert type(training_rows([table], PROCESSOR, max_length=300)) is TrainingRows
    np.testing.assert_array_equal(training_rows([table, table], PROCESSOR, max_length=300).sizes()[:, 0], [0] * 6)
    assert json.loads((tmp_path / "rows.json").read_text()) == _texts(3)
