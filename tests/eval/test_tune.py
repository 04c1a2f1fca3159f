"""Tuning: of each kind of method the best setting on one split, and no other, is tested on another."""

import io
import json

import pytest
from rich.console import Console

from mllm_vision.eval.tasks.scene_captions import SceneCaptions
from mllm_vision.eval.tasks.scenes import Scenes
from mllm_vision.eval.tune import report, tune
from mllm_vision.reducers import HiPruneConfig, PoolConfig

CHOOSING = Scenes(questions=8, families="count/colour", split="validation")
TESTING = Scenes(questions=6, families="count/colour")
TRIALS = [[HiPruneConfig(keep=2)], [PoolConfig(keep=64)], [HiPruneConfig(keep=90)], [PoolConfig(keep=4)]]
HEADLINE = ("mean of families", "accuracy")


@pytest.fixture(scope="module")
def tuned(loaded, tmp_path_factory):
    """A small tuning: its folder and its record."""
    out = tmp_path_factory.mktemp("tune")
    return out, tune(*loaded, TRIALS, CHOOSING, TESTING, out, temperatures=(0.0, 1.0), seeds=2, name="tiny")


def test_the_best_of_each_kind_is_tested(tuned):
    out, record = tuned
    assert json.loads((out / "tune.json").read_text()) == json.loads(json.dumps(record))
    for temperature, runs in (("0", 1), ("1", 2)):
        parts = record["temperatures"][temperature]
        chosen = {row["methods"]: row["value"] for row in parts["chosen"]}
        assert list(chosen) == ["hiprune:keep=2", "pool:keep=64", "hiprune:keep=90", "pool:keep=4"]
        assert chosen["hiprune:keep=90"] > chosen["hiprune:keep=2"]
        tested = parts["tested"]
        assert [row["methods"] for row in tested.values()] == ["plain", "hiprune:keep=90", "pool:keep=64"]
        for row in tested.values():
            score = row["scores"][HEADLINE[0]][HEADLINE[1]]["value"]
            assert len(row["seeds"]) == runs and score == pytest.approx(sum(row["seeds"]) / runs)
            plain = tested["plain"]["scores"][HEADLINE[0]][HEADLINE[1]]["value"]
            assert row["differences"][HEADLINE[0]][HEADLINE[1]]["value"] == pytest.approx(score - plain)
    folders = {path.parent.relative_to(out).as_posix() for path in out.rglob("results.json")}
    assert folders == {
        *(
            f"choosing/{t}-0/{m}"
            for t in "01"
            for m in ("hiprune-keep=2", "hiprune-keep=90", "pool-keep=4", "pool-keep=64")
        ),
        *(f"testing/{t}/{m}" for t in ("0-0", "1-0", "1-1") for m in ("plain", "hiprune-keep=90", "pool-keep=64")),
    }


def test_sampled_answers_depend_on_the_seed(tuned):
    out, _ = tuned
    first, second = ((out / f"testing/1-{seed}/plain/scenes.jsonl").read_text() for seed in (0, 1))
    assert first != second


def test_the_table_shows_what_was_chosen(tuned):
    console = Console(width=160, file=io.StringIO())
    console.print(report(tuned[1]))
    lines = [line.split() for line in console.file.getvalue().splitlines() if "keep=" in line or "plain" in line]
    assert [line[0] for line in lines] == [
        "0",
        "hiprune:keep=90",
        "pool:keep=64",
        "1",
        "hiprune:keep=90",
        "pool:keep=64",
    ]


def test_the_fewest_faults_win_and_another_score_may_be_asked_for(loaded, tmp_path):
    choosing, testing = SceneCaptions(scenes=4, split="validation"), SceneCaptions(scenes=2)
    trials = [[HiPruneConfig(keep=1)], [HiPruneConfig(keep=95)]]
    for score, winner in ((None, min), (("all", "recall"), max)):
        record = tune(*loaded, trials, choosing, testing, tmp_path / str(score is None), score=score, batch_size=4)
        parts = record["temperatures"]["0"]
        assert record["task"]["score"] == list(score or ("all", "chair_s"))
        best = winner(parts["chosen"], key=lambda row: row["value"])
        assert parts["tested"]["hiprune"]["methods"] == best["methods"]


def test_a_score_that_there_is_not_is_answered_with_those_there_are(loaded, tmp_path):
    with pytest.raises(ValueError, match=r"scenes has no score colour/f1 here; there are .*colour/accuracy"):
        tune(*loaded, TRIALS[:1], CHOOSING, TESTING, tmp_path, score=("colour", "f1"))


@pytest.mark.parametrize(
    ("trials", "choosing", "message"),
    [
        ([], CHOOSING, "tuning needs trials"),
        (TRIALS, TESTING, "choose on another split of the task that is tested, got scenes:questions=6"),
        (TRIALS, SceneCaptions(), "got scene_captions:.* and scenes:"),
    ],
)
def test_what_would_be_no_test_is_refused(loaded, tmp_path, trials, choosing, message):
    with pytest.raises(ValueError, match=message):
        tune(*loaded, trials, choosing, TESTING, tmp_path)
