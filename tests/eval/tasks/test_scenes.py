"""The questions about drawn scenes, what an answer counts for, and the scores of the trained checkpoint."""

import json

import numpy as np
import pytest

import mllm_vision as mv
from mllm_vision.api import CHECKPOINTS
from mllm_vision.eval import evaluate
from mllm_vision.eval.scores import Tallies, scored
from mllm_vision.eval.tasks.scenes import Scenes, sample_questions
from mllm_vision.recipes.publish import model_card
from mllm_vision.scenes import FAMILIES, NEGATIVES, render, sample_scene

CHECKPOINT = CHECKPOINTS / "tiny-llava-scenes"


def scores_of(task, answer):
    """Values by group and name, of the answers that a function gives to examples."""
    examples = task.load().examples
    found = scored(task, Tallies.of(task, [(example, answer(example)) for example in examples]))
    return {group: {name: score.value for name, score in row.items()} for group, row in found.items()}


def test_answers_that_are_all_right_score_one():
    scores = scores_of(Scenes(questions=10), lambda example: example.target["answer"])
    existence = [f"existence_{kind}" for kind in NEGATIVES]
    assert list(scores) == [*existence, "count", "colour", "relation", "reading", "mean of families"]
    for group, row in scores.items():
        right = {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "yes_ratio": 0.5}
        assert row == (right if group in existence else {"accuracy": 1})


def test_negatives_are_scored_apart_and_share_their_positives():
    asked = sample_questions("test", "existence", 10)
    assert [question.kind for _, question in asked] == ["present", *NEGATIVES] * 5

    def fooled_by_adversarial_negatives(example):
        return "yes" if {"present", "adversarial"} & set(example.id.split("-")) else "no"

    scores = scores_of(Scenes(questions=10, families="existence"), fooled_by_adversarial_negatives)
    assert scores["existence_random"]["f1"] == scores["existence_popular"]["f1"] == 1
    assert scores["existence_adversarial"] == pytest.approx(
        {"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": 2 / 3, "yes_ratio": 1}
    )
    # The mean is over families, so that existence counts once: (1 + 1 + 1/2) / 3.
    assert scores["mean of families"]["accuracy"] == pytest.approx(5 / 6)


def test_questions_are_the_same_every_time_and_fewer_are_the_first_of_more():
    asked = sample_questions("test", "colour", 5)
    assert asked == sample_questions("test", "colour", 5) == sample_questions("test", "colour", 9)[:5]
    assert asked != sample_questions("test", "colour", 5, seed=1)
    assert asked != sample_questions("validation", "colour", 5)
    first = Scenes(questions=5, families="colour").load().examples[0]
    np.testing.assert_array_equal(np.asarray(first.images[0]()), np.asarray(render(asked[0][0])))


def test_large_scenes_with_small_print_are_asked_about_as_they_are_drawn():
    task = Scenes(questions=4, families="reading", side=280, text_scale=0.5)
    questions = task.load()
    assert questions.provenance == {"source": "scenes", "split": "test", "side": 280, "text_scale": 0.5, "seed": 0}
    for example in questions.examples:
        scene = sample_scene("test", int(example.id.split("-")[-1]), side=280, text_scale=0.5)
        np.testing.assert_array_equal(np.asarray(example.images[0]()), np.asarray(render(scene)))


@pytest.mark.parametrize(
    ("family", "answer", "right"),
    [
        ("existence", "Yes.", 1),
        ("existence", " YES ", 1),
        ("existence", "yes, it is", 0),
        ("existence", "No, not visible", 0),
        ("existence", "", 0),
        ("colour", "Red.", 1),
        ("colour", "red red", 0),
        ("colour", "红", 0),
        ("colour", "🟥", 0),
        ("colour", "red" * 4000, 0),
    ],
)
def test_an_answer_is_read_as_it_stands(family, answer, right):
    truth = "yes" if family == "existence" else "red"
    tally = Scenes().tally({"family": family, "answer": truth}, answer)
    assert (tally["n"], tally["right"]) == (1, right)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": "colour/color"}, "families must be of existence, count, colour, relation, reading, got color"),
        ({"questions": 0}, "questions must be 1 or more, got 0"),
        ({"split": "val"}, "split must be one of 'train', 'validation', 'test', got 'val'"),
    ],
)
def test_options_that_make_no_sense_are_answered_with_those_that_do(options, message):
    with pytest.raises(ValueError, match=message):
        Scenes(**options)


def test_the_checkpoint_scores_what_its_card_says():
    stated = json.loads((CHECKPOINT / "scores.json").read_text())["scores"]
    model, processor = mv.load("tiny-llava-scenes")
    measured = evaluate(model, processor, "scenes:questions=60", batch_size=32).tasks["scenes"].values()
    assert list(measured) == list(stated)
    for group, score in measured.items():
        # The sample is the first 60 of the card's 500: three standard errors of an accuracy at n = 60.
        spread = 3 * (max(stated[group]["accuracy"] * (1 - stated[group]["accuracy"]), 0.02) / 60) ** 0.5
        assert score["accuracy"] == pytest.approx(stated[group]["accuracy"], abs=spread), group


@pytest.mark.slow
def test_the_checkpoint_scores_exactly_what_its_card_says():
    stated = json.loads((CHECKPOINT / "scores.json").read_text())["scores"]
    model, processor = mv.load("tiny-llava-scenes")
    measured = evaluate(model, processor, "scenes", batch_size=32).tasks["scenes"].values()
    assert {group: row["n"] for group, row in measured.items()} == {group: row["n"] for group, row in stated.items()}
    for group, row in stated.items():
        assert {name: measured[group][name] for name in row} == pytest.approx(row), group


def test_the_card_of_the_checkpoint_is_made_from_its_scores():
    facts = json.loads((CHECKPOINT / "scores.json").read_text())
    assert (CHECKPOINT / "README.md").read_text() == model_card(facts)


def test_every_family_can_be_asked_alone():
    for family in FAMILIES:
        assert {example.id.split("-")[0] for example in Scenes(questions=3, families=family).load().examples} == {
            family
        }
