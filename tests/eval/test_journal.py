"""Answers on disk: what a killed process leaves can be read and gone on with."""

import json
import resource
import signal

import pytest

from mllm_vision.eval import journal as journals
from mllm_vision.eval.journal import Journal, check_folder

SETTINGS = {"methods": [], "dtype": "float32"}
RECORDS = [{"id": str(i), "prompt": f"{i}?", "answer": "да\n🙂"} for i in range(4)]


def by_id(records):
    return {record["id"]: record for record in records}


def test_what_several_processes_wrote_is_read_together(tmp_path):
    journal = Journal(tmp_path, "pope", SETTINGS)
    assert journal.read() == {}
    journal.append(RECORDS[:1], 0)
    journal.append(RECORDS[1:2], 3)
    journal.append(RECORDS[2:], 0)
    assert Journal(tmp_path, "pope", SETTINGS).read() == by_id(RECORDS)
    assert Journal(tmp_path, "gqa", SETTINGS).read() == {}


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_that_was_cut_off_is_forgotten_and_mended(tmp_path, cut):
    journal = Journal(tmp_path, "pope", SETTINGS)
    journal.append(RECORDS, 0)
    file = tmp_path / "pope.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    assert journal.read() == by_id(RECORDS[:3])
    journal.mend(0)
    journal.append(RECORDS[3:], 0)
    assert journal.read() == by_id(RECORDS)


def test_a_header_that_was_cut_off_is_written_again(tmp_path):
    (tmp_path / "pope.jsonl").write_text('{"task": "po')
    journal = Journal(tmp_path, "pope", SETTINGS)
    assert journal.read() == {}
    journal.mend(0)
    journal.append(RECORDS, 0)
    assert journal.read() == by_id(RECORDS)


def test_a_finished_run_leaves_one_file(tmp_path):
    journal = Journal(tmp_path, "pope", SETTINGS)
    for process in range(3):
        journal.append(RECORDS[process : process + 1], process)
    journal.finish(RECORDS)
    assert [path.name for path in tmp_path.iterdir()] == ["pope.jsonl"]
    header, *lines = (json.loads(line) for line in (tmp_path / "pope.jsonl").read_text().split("\n")[:-1])
    assert header == {"task": "pope", "settings": SETTINGS}
    assert lines == RECORDS


def test_answers_of_other_settings_are_refused_and_can_be_cleared(tmp_path):
    Journal(tmp_path, "pope", SETTINGS).append(RECORDS, 1)
    other = Journal(tmp_path, "pope", {**SETTINGS, "dtype": "bfloat16"})
    with pytest.raises(ValueError, match=r"answers of another run: dtype was 'float32' and is 'bfloat16'; choose"):
        other.read()
    other.clear()
    assert other.read() == {}


def test_a_damaged_file_is_an_error(tmp_path):
    journal = Journal(tmp_path, "pope", SETTINGS)
    journal.append(RECORDS, 0)
    with (tmp_path / "pope.jsonl").open("a") as out:
        out.write("not JSON\n")
    with pytest.raises(ValueError, match=r"pope.jsonl is damaged .* remove it, or choose another folder"):
        journal.read()


def test_a_folder_is_made_and_left_as_it_was(tmp_path):
    check_folder(tmp_path / "a" / "b", 1000)
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file cannot be a folder, since a file is in the way"):
        check_folder(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="since a file is in the way"):
        check_folder(tmp_path / "file" / "below")


def test_too_little_room_is_an_error_before_work_starts(tmp_path, monkeypatch):
    free = 50_000_000
    monkeypatch.setattr(journals.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    check_folder(tmp_path, 40_000)
    with pytest.raises(OSError, match="has 50 MB left, and 50000 answers may need 52 MB"):
        check_folder(tmp_path, 50_000)


def test_a_disk_that_refuses_to_be_written_is_an_error(tmp_path):
    """A limit on the size of files, as a quota has it: there is room on paper, and writing fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written to \(File too large\); choose another folder"):
            check_folder(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
