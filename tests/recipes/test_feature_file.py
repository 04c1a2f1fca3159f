"""What one process wrote, all read, and what a kill cut off is not missed."""

import pickle

import pytest
import torch

from mllm_vision.recipes.feature_file import FeatureFile, RowFile, write_rows


def test_a_killed_run_goes_on_behind_its_last_whole_batch(tmp_path):
    kept = torch.arange(24.0).view(3, 2, 4)
    file = FeatureFile(tmp_path, (2, 4))
    assert file.repaired() == {}
    file.append(["a", "b"], kept[:2])
    with (tmp_path / "features.float16").open("ab") as features:
        features.write(kept[2:].half().numpy().tobytes() + b"half")
    with (tmp_path / "pictures.txt").open("a") as digests:
        digests.write("half")  # of a line
    assert FeatureFile(tmp_path, (2, 4)).repaired() == {"a": 0, "b": 1}
    file.append(["c"], kept[2:])
    assert file.repaired() == {"a": 0, "b": 1, "c": 2}
    assert torch.equal(FeatureFile(tmp_path, (2, 4)).read([2, 0]), kept[[2, 0]].half())


def test_a_line_without_features_goes(tmp_path):
    file = FeatureFile(tmp_path, (1, 1))
    file.repaired()
    file.append(["a"], torch.ones(1, 1, 1))
    (tmp_path / "pictures.txt").write_text("a\nb\n")
    assert file.repaired() == {"a": 0} and (tmp_path / "pictures.txt").read_text() == "a\n"


def test_what_is_written_is_checked(tmp_path):
    file = FeatureFile(tmp_path, (2, 4))
    file.repaired()
    with pytest.raises(ValueError, match="too large for float16"):
        file.append(["a"], torch.full((1, 2, 4), 1e6))
    with pytest.raises(ValueError, match=r"the tower made \(3, 4\) features of a picture, its config says \(2, 4\)"):
        file.append(["a"], torch.zeros(1, 3, 4))
    assert file.repaired() == {}


def test_reading_opens_nothing_until_it_is_asked_and_writes_nothing(tmp_path):
    FeatureFile(tmp_path / "none", (2, 4))
    assert list(tmp_path.iterdir()) == []


def test_rows_are_read_by_number_and_memory_holds_eight_bytes_of_each(tmp_path):
    rows = [{"ids": torch.arange(i % 7), "row_id": str(i), "numbers": [i]} for i in range(200)]
    held = []
    for count in (100, 200):
        (tmp_path / str(count)).mkdir()
        write_rows(tmp_path / str(count), iter(rows[:count]))
        file = RowFile(tmp_path / str(count))
        held.append(len(pickle.dumps(file)))  # as for the workers of a loader
        assert len(file) == count
    assert held[1] - held[0] == 100 * 8
    file = pickle.loads(pickle.dumps(file))
    for i in (199, 0, 1, 107):
        row = file[i]
        assert torch.equal(row.pop("ids"), rows[i]["ids"]) and row == {"row_id": str(i), "numbers": [i]}
    for outside in (-1, 200):
        with pytest.raises(IndexError, match=f"there are 200 rows, got number {outside}"):
            file[outside]
