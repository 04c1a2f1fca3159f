"""The questions about composed photographs, what an answer counts for, and which are asked."""

import shutil

import pytest

from mllm_vision.eval.scores import Tallies, scored
from mllm_vision.eval.task import parse_tasks, task_class
from mllm_vision.eval.tasks.photos import Photos
from mllm_vision.photos import NEGATIVES, export_photos
from tests.eval.tasks.local import write_folder
from tests.photos.conftest import draw_backgrounds, draw_cutouts


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "photos", "photos")


def scores_of(examples, answer):
    """Values by group and name, of the answers that a function gives to examples."""
    found = scored(Photos(), Tallies.of(Photos(), [(example, answer(example)) for example in examples]))
    return {group: {name: score.value for name, score in row.items()} for group, row in found.items()}


def test_what_is_written_can_be_asked_and_right_answers_score_one(tmp_path):
    cutouts, backgrounds = draw_cutouts(tmp_path / "stamps"), draw_backgrounds(tmp_path / "pictures")
    sizes = {"train": 1, "validation": 4, "test": 30}
    folder = export_photos(tmp_path / "photos", cutouts, [backgrounds], sizes, side=112)
    found = Photos().load(folder)
    assert found.faults == {}
    scores = scores_of(found.examples, lambda example: f" {example.target['answer'].title()}.")
    existence = [f"existence_{kind}" for kind in NEGATIVES]
    others = ["count", "position_relation", "position_quarter"]
    assert set(scores) == {*existence, *others, "mean of families"}
    right = {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "yes_ratio": 0.5}
    assert all(row == (right if group in existence else {"accuracy": 1}) for group, row in scores.items())
    assert {example.images[0]().size for example in found.examples} == {(112, 112)}
    assert len({example.unit for example in found.examples}) == 30
    assert len({example.unit for example in Photos(split="validation").load(folder).examples}) == 4


def test_the_mean_is_over_families(folder):
    def wrong_about_adversarial_negatives_and_quarters(example):
        wrong = "existence_adversarial" in example.groups and len(example.groups) == 1
        return "yes" if wrong else "left" if example.groups == ("position_quarter",) else example.target["answer"]

    scores = scores_of(Photos().load(folder).examples, wrong_about_adversarial_negatives_and_quarters)
    assert scores["existence_random"]["f1"] == scores["existence_popular"]["f1"] == 1
    assert scores["existence_adversarial"] == pytest.approx(
        {"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": 2 / 3, "yes_ratio": 1}
    )
    existence, count, position = (1 + 1 + 1 / 2) / 3, 1, (1 + 0) / 2
    assert scores["mean of families"]["accuracy"] == pytest.approx((existence + count + position) / 3)


@pytest.mark.parametrize(
    ("family", "truth", "answer", "right"),
    [
        ("existence", "yes", "Yes.", 1),
        ("existence", "yes", "yes, it is", 0),
        ("existence", "no", "", 0),
        ("count", "two", "Two", 1),
        ("count", "two", "2", 1),
        ("count", "two", "3", 0),
        ("count", "two", "two dogs", 0),
        ("position", "top left", "Top left.", 1),
        ("position", "top left", "left", 0),
        ("position", "left", "right", 0),
    ],
)
def test_odd_answers(family, truth, answer, right):
    assert Photos().tally({"family": family, "answer": truth}, answer)["right"] == right


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ("questions=1", [f"0-{i}" for i in range(7)]),
        ("questions=1:families=count", ["0-4"]),
        ("questions=2:families=count/position", ["0-4", "0-5", "0-6", "1-4"]),
        ("families=existence", [f"{picture}-{i}" for picture in (0, 1) for i in range(4)]),
    ],
)
def test_the_first_questions_of_each_kind_are_asked(options, ids, folder):
    [task] = parse_tasks(f"photos:{options}")
    assert [example.id for example in task.load(folder).examples] == [f"test-00000{id}" for id in ids]


def test_broken_rows_are_faults_and_cost_no_other(folder):
    file = folder / "questions" / "test.jsonl"
    fine = file.read_text()
    broken = [
        "{",
        "{}",
        fine.splitlines()[0].replace("existence", "smell"),
        fine.splitlines()[0].replace('"yes"', '"si"'),
    ]
    broken.append(fine.splitlines()[0].replace("beach", "gone"))
    file.write_text("\n".join(broken) + "\n" + fine)
    found = Photos().load(folder)
    assert list(found.faults) == [f"row {i}" for i in range(5)]
    faults = " ".join(found.faults.values())
    for said in ("no JSON", "no column", "family must be one of existence, count, position, got 'smell'", "got 'si'"):
        assert said in faults
    assert "gone.png" in found.faults["row 4"]
    assert len(found.examples) == 12


def test_what_is_missing_is_said(folder):
    shutil.rmtree(folder / "questions")
    with pytest.raises(ValueError, match=r"there is no .*questions/test.jsonl; `mllm-vision photos .*` writes it"):
        Photos().load(folder)
    with pytest.raises(ValueError, match="photos has no data set on the hub; give the folder of a local copy"):
        Photos().load()
    with pytest.raises(ValueError, match="questions must be 1 or more, got 0"):
        Photos(questions=0)
    with pytest.raises(ValueError, match="families must be of existence, count, position, got colour"):
        Photos(families="count/colour")
    assert task_class("photos").data is None
